"""Everything between actors and learner: one Redis server holds the run's state, the weight store its weights.

Every state a ticket can be in, and every transition. Each transition is one Lua script, hence atomic; nothing else
writes these keys, so the ledger's counters can be held against the structures at any instant (`buffer.ledger`).

    state       structure                       entered by                    left by
    generating  zset, scored by lease expiry    issue                         submit, give_back, fail, expire
    retry       list                            give_back, fail, expire,      issue
                                                return_stale, reject
    buffered    stream entry + payload string   submit, begin_epoch           lease
    leased      pending entry of the epoch's    lease                         commit, mark_filtered, return_stale,
                consumer group                                                reject, begin_epoch (buffered again)
    trained     counter                         commit                        never
    filtered    counter                         mark_filtered                 never
    dead        stream                          fail, expire, reject          never

    issue  ->  generating  -> submit ->  buffered  -> lease ->  leased  -> commit ->  trained
      ^            | give_back, fail, expire                      | return_stale, reject, mark_filtered
      +-- retry <--+----------------------------------------------+-->  dead, filtered

Modules: `run` (entry point), `tickets`, `groups` and `submission`, `clock`, `registry`, `control`, `ledger`, `events`
(what waits block on), `keys`, `scripts`, `connection` and `topology` (which server), `aio` (the same for actors written
with asyncio), `embedded` (a server of one's own), `store` (weights). Importing this package imports none of them; only
`store` needs fsspec.
"""
