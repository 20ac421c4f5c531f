"""To start from: `corpus` trains, predicts and serves its log; `basics` has small models; `web` is an application."""
