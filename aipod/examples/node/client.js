// A client of aipod for Node 20 or newer on stock @grpc/grpc-js; aipod/docs/wire.md explains what it does.
//
//   node client.js [--to HOST:PORT] [--ticket FILE] [-k NAME=JSON]... [-o OUT] METHOD [FILE]
//
// It sends FILE to METHOD, survives lost connections and restarts of the server, and writes the answer to OUT, or to
// stdout where it is JSON. With --ticket the same command goes on after this process itself was killed.
// Exit status: 0 done, 1 the job failed or was refused, 2 wrong usage, 3 no server answers, or the job is lost.
'use strict';

const crypto = require('crypto');
const fs = require('fs');
const os = require('os');
const path = require('path');
const { parseArgs } = require('util');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');
const protobuf = require('protobufjs');
const zstd = require('@bokuweb/zstd-wasm'); // Node itself has zstd since 22.15
const { createXXHash128 } = require('hash-wasm');

const CHUNK = 1 << 20; // bytes of payload in a message at most, as one zstd frame that states its size
const LEVEL = 3; // of zstd
const SILENCE = 15e3; // ms without a message: fifteen heartbeats are missing
const PATIENCE = 600e3; // ms without progress before the job is given up; the server keeps it as long
// schema/ai.proto as `protoc --descriptor_set_out` gives it: beside a copy of this file, or where it is in aipod.
const SCHEMA = ['.', '../../wire'].map((at) => path.join(__dirname, at, 'ai.binpb')).find(fs.existsSync);
const { AI } = grpc.loadPackageDefinition(
  loader.loadFileDescriptorSetFromBuffer(fs.readFileSync(SCHEMA), { keepCase: true, enums: String, defaults: true }),
).ai;

// ---- errors: google.rpc.Status in trailer grpc-status-details-bin

const RPC = protobuf.parse(`syntax = "proto3";
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; }
  message RetryInfo { Duration retry_delay = 1; }
  message Duration { int64 seconds = 1; int32 nanos = 2; }`, { keepCase: true }).root;

// aipod's reason, and after how many ms to come back; no reason: a proxy or the network has ended the call.
function explain(error) {
  const found = {};
  const trailer = (error.metadata && error.metadata.get('grpc-status-details-bin')[0]) || Buffer.alloc(0);
  for (const { type_url: type, value } of RPC.lookupType('Status').decode(trailer).details) {
    const name = type.split('/google.rpc.')[1];
    if (name === 'ErrorInfo') {
      const info = RPC.lookupType(name).decode(value);
      if (info.domain === 'aipod') found.reason = info.reason;
    } else if (name === 'RetryInfo') {
      const { seconds, nanos } = RPC.lookupType(name).decode(value).retry_delay;
      found.delay = Number(seconds) * 1e3 + nanos / 1e6;
    }
  }
  return found;
}

const lost = (text) => Object.assign(new Error(text), { code: grpc.status.UNAVAILABLE });

class Failed extends Error {
  constructor(reason, text, status = 1) {
    super(`${reason}: ${text}`);
    this.status = status;
  }
}

// Statuses that say nothing about the job without aipod's reason: UNKNOWN, INTERNAL, UNAVAILABLE, CANCELLED and
// DEADLINE_EXCEEDED are how proxies and libraries word a lost connection. Reasons that ask to come back: see wire.md.
const LOST = [1, 2, 4, 13, 14];
const AGAIN = ['OFFSET_MISMATCH', 'UPLOAD_STALLED', 'TRUNCATED', 'WRONG_SPOOL'];

// ---- a job

class Job {
  constructor(options, method, file, kwargs) {
    Object.assign(this, { options, method, file, kwargs, size: file ? fs.statSync(file).size : 0 });
    Object.assign(this, { ticket: crypto.randomBytes(16), epoch: 0, spool: '', logSeen: 0, steps: '' });
    const saved = options.ticket;
    if (saved && fs.existsSync(saved)) {
      const { ticket, epoch, spool } = JSON.parse(fs.readFileSync(saved));
      Object.assign(this, { ticket: Buffer.from(ticket, 'hex'), epoch, spool });
    }
    this.id = crypto.createHash('sha256').update(this.ticket).digest('hex').slice(0, 32);
    this.part = options.o ? `${options.o}.${this.id}.part` : path.join(fs.mkdtempSync(`${os.tmpdir()}/job-`), 'part');
  }

  // On the disk before the message goes out that it is about: else a new process could start the method once more.
  save() {
    if (!this.options.ticket) return;
    const text = JSON.stringify({ ticket: this.ticket.toString('hex'), epoch: this.epoch, spool: this.spool });
    fs.writeFileSync(`${this.options.ticket}.new`, text, { mode: 0o600, flush: true });
    fs.renameSync(`${this.options.ticket}.new`, this.options.ticket);
  }

  get have() {
    return fs.existsSync(this.part) ? fs.statSync(this.part).size : 0;
  }

  // The first message of every connection. Who has ever sent `last` resumes, and never creates the job again.
  open(op) {
    this.epoch = Math.max(this.epoch + 1, Date.now() * 1000);
    this.save();
    const { ticket, epoch, spool, size, have, logSeen } = this;
    return { ticket, op, epoch, spool, size, have, log_have: logSeen };
  }

  // One connection: the answer's content type once it is here; throws `Failed`, or what grpc-js says of a lost one.
  async attempt(client) {
    const metadata = new grpc.Metadata();
    metadata.set('x-func-name', this.method);
    metadata.set('x-job-id', this.id);
    if (this.options.upstream) metadata.set('x-upstream', this.options.upstream);
    const call = client.chaos(metadata);
    let timer;
    const heard = () => {
      clearTimeout(timer);
      timer = setTimeout(() => call.cancel(), SILENCE);
    };
    heard();
    const kwargs = Buffer.from(JSON.stringify(this.kwargs));
    call.write({ data: zstd.compress(kwargs, LEVEL), open: this.open(this.spool ? 'OP_RESUME' : 'OP_RUN') });
    let uploading;
    let done;
    try {
      for await (const raw of call) {
        heard();
        if (raw.state) {
          const { phase, error } = raw.state;
          this.tell(raw.state);
          if (phase === 'PHASE_RECEIVING') uploading ??= this.upload(call, raw.state).catch((e) => call.destroy(e));
          if (phase === 'PHASE_DONE') done = raw.state;
          if (['PHASE_FAILED', 'PHASE_CANCELLED', 'PHASE_RELEASED'].includes(phase)) {
            throw new Failed((error && error.reason) || phase, (error && error.message) || 'no answer');
          }
        } else if (done) {
          this.receive(raw);
          if (raw.last) return await this.check(done);
        }
      }
      throw lost('the call ended without an outcome');
    } finally {
      clearTimeout(timer);
      call.cancel();
      call.on('error', () => {});
      await uploading;
    }
  }

  // What the server does not have yet, from where its first state says. `last` commits: from then on the job may run.
  async upload(call, { offset, spool }) {
    const hasher = (await createXXHash128()).init();
    const from = Number(offset);
    const write = (message) => new Promise((resolve) => {
      call.once('close', resolve); // of a call that is over; its reader says why
      call.write(message, () => {
        call.off('close', resolve);
        resolve();
      });
    });
    const input = this.file ? fs.createReadStream(this.file, { highWaterMark: CHUNK }) : [];
    let at = 0;
    for await (const piece of input) {
      hasher.update(piece);
      const end = at + piece.length;
      if (end > from) {
        const start = Math.max(from, at);
        await write({ data: zstd.compress(piece.subarray(start - at), LEVEL), offset: start });
      }
      if (call.destroyed) return;
      at = end;
    }
    this.spool = spool;
    this.save();
    await write({ offset: at, last: true, digest: Buffer.from(hasher.digest('binary')) });
    call.end();
  }

  receive({ data, offset }) {
    if (Number(offset) !== this.have) throw this.damaged();
    try {
      if (data.length) fs.appendFileSync(this.part, zstd.decompress(data));
    } catch {
      throw this.damaged();
    }
  }

  // The answer's content type, once it is here as the server has stored it.
  async check({ size, digest, content_type: type }) {
    const hasher = (await createXXHash128()).init();
    if (this.have) for await (const piece of fs.createReadStream(this.part)) hasher.update(piece);
    if (this.have !== Number(size) || !digest.equals(hasher.digest('binary'))) throw this.damaged();
    return type;
  }

  damaged() {
    fs.rmSync(this.part, { force: true });
    return lost('the answer arrived damaged');
  }

  tell(state) {
    this.steps = `${state.phase} ${state.offset} ${this.have}`;
    const seen = this.logSeen - Number(state.log_offset);
    const text = state.log.subarray(Math.max(0, seen));
    this.logSeen = Math.max(this.logSeen, Number(state.log_offset) + state.log.length);
    if (text.length) process.stderr.write(text);
  }

  // One connection after the other, for as long as there is progress now and then.
  async run() {
    let since = Date.now();
    let failures = 0;
    for (;;) {
      const before = this.steps;
      const client = new AI(this.options.to, grpc.credentials.createInsecure());
      try {
        return await this.attempt(client);
      } catch (error) {
        if (error instanceof Failed || !(error.code in grpc.status)) throw error;
        const { reason, delay } = explain(error);
        const passes = reason ? delay !== undefined || AGAIN.includes(reason) : LOST.includes(error.code);
        const text = error.details || error.message;
        if (!passes) throw new Failed(reason || grpc.status[error.code], text, reason === 'NOT_STARTED' ? 3 : 1);
        if (this.steps !== before) [since, failures] = [Date.now(), 0];
        failures += 1;
        const patience = this.steps ? PATIENCE : 30e3;
        if (Date.now() - since > patience) throw new Failed(this.spool ? 'JOB_LOST' : 'UNREACHABLE', text, 3);
        process.stderr.write(`again: ${reason || text}\n`);
        const pause = Math.random() * Math.min(5e3, 500 * 2 ** (failures - 1));
        await new Promise((resolve) => setTimeout(resolve, Math.max(pause, delay || 0)));
      } finally {
        client.close();
      }
    }
  }

  // The server may forget the answer now. Where this does not arrive, it does so after a while by itself.
  release() {
    const client = new AI(this.options.to, grpc.credentials.createInsecure());
    const metadata = new grpc.Metadata();
    metadata.set('x-job-id', this.id);
    if (this.options.upstream) metadata.set('x-upstream', this.options.upstream);
    return new Promise((resolve) => {
      const call = client.chaos(metadata, { deadline: Date.now() + 2e3 });
      call.on('data', () => {}).on('error', () => {}).on('status', resolve);
      call.write({ open: { ticket: this.ticket, op: 'OP_RELEASE' } });
      call.end();
    }).finally(() => client.close());
  }
}

async function main() {
  const text = { type: 'string' };
  const { values, positionals } = parseArgs({
    options: {
      to: { ...text, default: '127.0.0.1:50051' }, ticket: text, upstream: text, o: { ...text, short: 'o' },
      k: { ...text, short: 'k', multiple: true, default: [] },
    },
    allowPositionals: true,
  });
  const [method, file] = positionals;
  if (!method) throw Object.assign(new Error('which method? node client.js METHOD [FILE]'), { status: 2 });
  const kwargs = Object.fromEntries(values.k.map((pair) => {
    const at = pair.indexOf('=');
    return [pair.slice(0, at), JSON.parse(pair.slice(at + 1))];
  }));
  await zstd.init();
  const job = new Job(values, method, file, kwargs);
  try {
    const type = await job.run();
    if (!values.o && type !== 'application/json') throw new Failed('USAGE', 'no JSON; name a file: -o OUT', 2);
    if (values.o) fs.renameSync(job.part, values.o);
    else process.stdout.write(`${fs.readFileSync(job.part)}\n`);
    if (values.ticket) fs.rmSync(values.ticket);
    await job.release();
  } finally {
    if (!values.o) fs.rmSync(path.dirname(job.part), { recursive: true, force: true });
  }
}

main().catch((error) => {
  process.stderr.write(`${error.message}\n`);
  process.exitCode = error.status ?? 1;
});
