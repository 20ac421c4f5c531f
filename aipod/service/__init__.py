"""gRPC method bodies: `ai` is the service, `viewer` one call of it, `status` the one exit for errors."""
