"""gRPC over HTTP/2: grpclib and h2, subclassed where their defaults do not survive strangers.

`http2` is what both sides share, `server` and `channel` are the two sides, `codec` the messages, `bridge` the one
place where trio and asyncio meet. Nothing outside this package touches a private name of grpclib or h2.
"""
