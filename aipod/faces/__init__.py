"""The client for those who have no asyncio loop: `sync` for threads, `trio` for trio. No logic of their own.

The client itself works on a loop of asyncio's own, in a thread that belongs to it (`host`); nothing here imports
trio_asyncio. What the faces offer is taken from the client's own methods, with signatures and docs (`face`).
"""
