"""The story of one job: `request` reads what is asked for, `upload` takes the payload in, `run` queues and runs it,
`reply` makes the answer."""
