// A stranger's client on stock @grpc/grpc-js, with the options of the first version.
//
// Reads a JSON list of calls from stdin, makes them one after the other, and writes what came back to stdout:
//   {address, proto, calls: [{rpc, kwargs, version, metadata, payload, packed, timeout, cancelOn}]}
//   [{code, details, metadata, trailers, messages}]     bytes are base64
// `payload` is a file that is compressed here, `packed` one that is already; `cancelOn` is a file whose appearance
// makes the client cancel the call.
'use strict';

const fs = require('fs');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const PIECE = 32 * 1024;
const OPTIONS = {
  'grpc.max_send_message_length': -1,
  'grpc.max_receive_message_length': -1,
  'grpc.default_compression_algorithm': grpc.compressionAlgorithms.gzip,
  'grpc.keepalive_time_ms': 5000,
  'grpc.keepalive_timeout_ms': 120000,
  'grpc.keepalive_permit_without_calls': 1,
  'grpc.http2.max_pings_without_data': 0,
  'grpc.service_config': JSON.stringify({
    methodConfig: [{
      name: [{}],
      retryPolicy: {
        maxAttempts: 5,
        initialBackoff: '1s',
        maxBackoff: '30s',
        backoffMultiplier: 2,
        retryableStatusCodes: ['INTERNAL', 'UNAVAILABLE', 'UNKNOWN'],
      },
    }],
  }),
};

// A zstd frame with one block, stored as it is (RFC 8878 section 3.1.1): Node has zstd only from 22.15 on.
function stored(data) {
  const head = Buffer.alloc(12);
  head.writeUInt32LE(0xfd2fb528, 0);
  head.writeUInt8(0xa0, 4); // a content size of 4 bytes, single segment, no checksum
  head.writeUInt32LE(data.length, 5);
  head.writeUIntLE((data.length << 3) | 1, 9, 3); // last block, raw
  return Buffer.concat([head, data]);
}

function* pieces(call) {
  const name = call.payload || call.packed;
  const data = name ? fs.readFileSync(name) : Buffer.alloc(0);
  for (let at = 0; at < data.length; at += PIECE) {
    const piece = data.subarray(at, at + PIECE);
    yield call.payload ? stored(piece) : piece;
  }
}

async function send(stream, call) {
  const kwargs = stored(Buffer.from(JSON.stringify(call.kwargs || {})));
  const chaos = call.rpc === 'chaos';
  stream.write(chaos ? { data: kwargs } : { kwargs_json: kwargs, version: call.version || '' });
  for (const data of pieces(call)) {
    if (!stream.write(chaos ? { data } : { raw: { data } })) {
      await new Promise((resolve) => {
        stream.once('drain', resolve);
        stream.once('status', resolve);
      });
    }
  }
  stream.end();
}

function plain(metadata) {
  const named = Object.entries(metadata.getMap());
  return Object.fromEntries(named.map(([k, v]) => [k, Buffer.isBuffer(v) ? v.toString('base64') : v]));
}

function make(client, call) {
  return new Promise((resolve) => {
    const metadata = new grpc.Metadata();
    Object.entries(call.metadata || {}).forEach(([name, value]) => metadata.set(name, value));
    const deadline = Date.now() + (call.timeout || 60) * 1000;
    const stream = client[call.rpc](metadata, { deadline });
    const reply = { messages: [], metadata: {} };
    stream.on('metadata', (seen) => { reply.metadata = plain(seen); });
    stream.on('data', (raw) => reply.messages.push(raw.data.toString('base64')));
    stream.on('error', () => {}); // the status says it, too
    const poll = call.cancelOn && setInterval(() => fs.existsSync(call.cancelOn) && stream.cancel(), 20);
    stream.on('status', ({ code, details, metadata: trailers }) => {
      clearInterval(poll);
      resolve({ ...reply, code, details, trailers: plain(trailers) });
    });
    send(stream, call);
  });
}

async function main() {
  const { address, proto, calls } = JSON.parse(fs.readFileSync(0));
  const { AI } = grpc.loadPackageDefinition(loader.loadSync(proto, { keepCase: true })).ai;
  const client = new AI(address, grpc.credentials.createInsecure(), OPTIONS);
  const replies = [];
  for (const call of calls) replies.push(await make(client, call));
  client.close();
  process.stdout.write(JSON.stringify(replies));
}

main();
