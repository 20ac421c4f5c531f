"""Arrow Flight: DoPut up, DoGet down, one column of bytes, a record batch per message.

Its documents (https://arrow.apache.org/docs/cpp/flight.html) advise to keep one client, to let batches be large, and
for the rest gRPC's own advice; compression is off by default. The batches are made of the blocks without a copy, and
read without one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow
from pyarrow import flight

from bench.peers import common

_SCHEMA = pyarrow.schema([("data", pyarrow.uint8())])


def _batches(size: int, message: int) -> Iterator[pyarrow.RecordBatch]:
    for data, _ in common.messages(size, message):
        column = pyarrow.Array.from_buffers(pyarrow.uint8(), len(data), [None, pyarrow.py_buffer(data)])
        yield pyarrow.RecordBatch.from_arrays([column], schema=_SCHEMA)


def _receive_all(reader: flight.MetadataRecordBatchReader) -> bytes:
    receipt = common.Receipt()
    for chunk in reader:
        column = chunk.data.column(0)
        receipt.add(memoryview(column.buffers()[1])[: len(column)])
    return receipt.seal()


class Server(flight.FlightServerBase):
    def do_put(
        self,
        context: flight.ServerCallContext,
        descriptor: flight.FlightDescriptor,
        reader: flight.MetadataRecordBatchReader,
        writer: flight.FlightMetadataWriter,
    ) -> None:
        writer.write(pyarrow.py_buffer(_receive_all(reader)))

    def do_get(self, context: flight.ServerCallContext, ticket: flight.Ticket) -> flight.RecordBatchStream:
        batches = _batches(*common.read_order(ticket.ticket))
        return flight.RecordBatchStream(pyarrow.RecordBatchReader.from_batches(_SCHEMA, batches))

    def do_action(self, context: flight.ServerCallContext, action: flight.Action) -> Iterator[bytes]:
        """Check a receipt: a client cannot answer on a DoGet."""
        common.check(action.body.to_pybytes(), *common.read_order(action.type.encode()))
        yield b""


def serve() -> None:
    with Server("grpc://127.0.0.1:0") as server:
        common.announce(server.port)
        server.serve()


def _up(client: flight.FlightClient, size: int, message: int) -> None:
    writer, answer = client.do_put(flight.FlightDescriptor.for_path("up"), _SCHEMA)
    for batch in _batches(size, message):
        writer.write_batch(batch)
    writer.done_writing()
    receipt = answer.read().to_pybytes()
    writer.close()
    common.check(receipt, size, message)


def _down(client: flight.FlightClient, size: int, message: int) -> None:
    order = common.make_order(size, message)
    receipt = _receive_all(client.do_get(flight.Ticket(order)))
    list(client.do_action(flight.Action(order.decode(), receipt)))


def _timed(up: bool, port: int, size: int, message: int) -> common.Report:
    transfer = _up if up else _down
    with flight.connect(("127.0.0.1", port)) as client:
        transfer(client, min(size, common.WARM_UP * message), message)
        with common.Clock() as clock:
            transfer(client, size, message)
    return clock.report() | {"bytes": size}


def send(port: int, size: int, message: int) -> common.Report:
    return _timed(True, port, size, message)


def receive(port: int, size: int, message: int) -> common.Report:
    return _timed(False, port, size, message)


if __name__ == "__main__":
    common.main(serve, {"send": send, "receive": receive})
