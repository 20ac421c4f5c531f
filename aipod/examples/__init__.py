"""Models to start from: `corpus` trains, predicts and serves its log; `basics` has small ones."""
