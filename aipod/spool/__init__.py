"""The directory where jobs live: entries, their locks, their journals, and what is swept away.

    spool/                 0700
      app                  MODULE.CLASS that this spool belongs to
      spool-id             random, made once; with the boot id behind it, it names this spool on the wire
      workers/<name>.lock  held by a worker process for as long as it lives; its name is another one after each run
      <id>.lock            held by the server process that works on the entry; unlinked only by who holds it
      <id>/                0700
        state              the journal: one line per step, "crc32 json\\n"; the fold of all whole lines is the truth;
                           its keys are explained in journal.Fields; state.tmp: what is to replace it, at a release
        in                 the decompressed payload; valid up to the journal's offset, the rest is noise
        kw                 kwargs JSON, where it is longer than `INLINE` (else in the journal)
        res                the result, uncompressed, where it is longer than `INLINE` (else in the journal)
        log                what the model logged
        live               progress, replaced once a tick and never synced
        seen               empty; its modification time says that somebody watches from another process
        want-<epoch>       empty; somebody with that epoch asks for the upload
        cancel             empty; somebody asks for the job to be stopped
        work/              the model's scratch directory
      .trash-*             being removed

The spool is the only state that server processes share: any of them answers by reading files, only the holder of the
entry's lock writes (`seen`, `want-*` and `cancel` are words to the holder). Nothing here is async, and nothing but this
package writes below `spool/` (a worker writes `res` and `work/` of its own job): callers hop to a thread.

Page cache survives a killed process, so only a power cut asks for fsync: the first `SYNC_AFTER` seconds of an entry are
never synced, which is why small jobs cost no flush. From then on nothing is told to anybody before it is on disk. An
answer that comes earlier is told at once; one that is too long for the journal is synced a tick later.

    locks      flock through filelock           entry      a job's directory, held
    journal    checksummed lines                directory  the spool itself
    look       what can be done without a lock  sweep      what nobody wants any more
    quota      what all entries take            joblog     what a method logs
"""

from aipod.spool.directory import MAX_ATTEMPTS, Spool, SpoolError
from aipod.spool.entry import SYNC_AFTER, SYNC_BYTES, Entry
from aipod.spool.joblog import MAX_LOG
from aipod.spool.journal import Journal
from aipod.spool.look import ENDED, Look, Words
from aipod.spool.sweep import Sweeper

__all__ = [
    "ENDED",
    "MAX_ATTEMPTS",
    "MAX_LOG",
    "SYNC_AFTER",
    "SYNC_BYTES",
    "Entry",
    "Journal",
    "Look",
    "Spool",
    "SpoolError",
    "Sweeper",
    "Words",
]
