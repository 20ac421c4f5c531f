"""What Prometheus reads of a server: `families` makes the numbers of `aipod.metrics` its own, `page` hands them out."""
