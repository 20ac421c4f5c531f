"""gRPC over HTTP/2: grpclib and h2, subclassed where their defaults do not survive strangers, or are slow.

From the socket inwards: `frames` cuts the byte stream, `protocol` is one connection with the watch over it,
`connection` writes and keeps the streams, `stream` is one of them, with its `window`, its `inbox` of messages and its
`turns` at the socket. `server` and `channel` are the two sides, `headers` what a request may say, `codec` the messages,
`limits` the rates, `tls` the certificates, `bridge` the one place where trio and asyncio meet. Nothing outside this
package touches a private name of grpclib or h2.
"""
