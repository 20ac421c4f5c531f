"""Models to start from: `corpus` trains, predicts and serves its log; `echo` and `sleeper` are for tests and demos."""
