use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::mpsc::channel;
use std::time::Duration;

use super::*;
use crate::backing::Backing;
use crate::backing::fault::{Call, FaultBacking, Rule};
use crate::backing::memory::{MemoryBacking, Options, Random};
use crate::crypto::secret::Secret;
use crate::error::FsError;
use rustix::io::Errno;

const ID: [u8; 16] = [3; 16];
const FILE: [u8; 16] = [7; 16];

impl Log {
    fn wait_on_device(&self, position: &Position) -> FsResult<()> {
        self.write_out_through(position.stream, position.seq)
    }

    fn wait_durable(&self, position: &Position) -> FsResult<()> {
        self.flush_through(position.stream, position.seq, &mut || {})
    }
}

impl Found {
    /// Reads the ciphertext of one of [`Found::records`].
    fn body(&self, record: &Record) -> io::Result<Vec<u8>> {
        let mut body = vec![0; record.body_len()];
        let file = &self.files[usize::from(record.place.stream) % STREAMS];
        if file.read_at(&mut body, record.body_at())? < body.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(body)
    }
}

fn mac_key(byte: u8) -> Arc<MacKey> {
    Arc::new(MacKey::new(&Secret::new_with(|key| key.fill(byte)).unwrap()).unwrap())
}

fn session(session: u32) -> SessionKey {
    SessionKey { session, key: mac_key(session as u8) }
}

fn sessions(session: u32) -> Option<Arc<MacKey>> {
    [1, 2].contains(&session).then(|| mac_key(session as u8))
}

fn anchor_key() -> MacKeys {
    anchor_key_of(200)
}

fn anchor_key_of(byte: u8) -> MacKeys {
    let key = MacKey::new(&Secret::new_with(|key| key.fill(byte)).unwrap()).unwrap();
    MacKeys::of_one(1, key)
}

fn small() -> Size {
    Size { hot: Size::MIN, bulk: Size::MIN }
}

fn at(dir: &NodeRef) -> [LogFile; STREAMS] {
    FILES.map(|name| LogFile { dir: dir.clone(), name, shown: "v".into() })
}

fn fresh(backing: &dyn Backing) {
    Log::format(&at(&backing.root()), small(), ID, &anchor_key(), true).unwrap();
}

fn find(backing: &dyn Backing) -> Result<Found> {
    let keys = anchor_key();
    let proof = Proof::Keys(&keys, &sessions);
    Log::find(&at(&backing.root()), &ID, proof, Access::ReadWrite)
}

fn start(backing: &dyn Backing) -> Arc<Log> {
    empty(find(backing).unwrap())
}

/// As if everything in it had gone home.
fn empty(found: Found) -> Arc<Log> {
    let log = found.resume();
    for _ in 0..2 {
        log.trim(log.next_seqs(), false, seal).unwrap();
    }
    log
}

fn seal(anchor: &Anchor) -> FsResult<[u8; 512]> {
    Ok(anchor.seal(&anchor_key()))
}

/// A write of `blocks` blocks, all bytes `byte`, whose size field says which write it is.
fn draft(number: u64, blocks: u64, byte: u8) -> Draft {
    let mut draft = Draft::new(Kind::Write, FILE, number);
    draft.entries = (0..blocks).map(|block| Entry { block, bytes: [byte; 32] }).collect();
    draft.body = vec![byte; blocks as usize * PAGE];
    draft
}

fn append(log: &Arc<Log>, stream: Stream, draft: Draft) -> Position {
    try_append(log, stream, draft).unwrap().unwrap()
}

/// None where there is no room.
fn try_append(log: &Arc<Log>, stream: Stream, draft: Draft) -> FsResult<Option<Position>> {
    let room = match log.reserve(stream, draft.pages(), || Err(Errno::INTR.into())) {
        Err(FsError::Os(Errno::INTR)) => return Ok(None),
        room => room?,
    };
    log.append(room, draft, None, &session(1)).map(Some)
}

fn numbers(found: &Found) -> Vec<u64> {
    found.records.iter().map(|record| record.draft.size).collect()
}

fn errno<T: Debug>(result: FsResult<T>) -> Errno {
    match result.unwrap_err() {
        FsError::Os(errno) => errno,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_was_appended_is_found_in_order() {
    let backing = MemoryBacking::new();
    fresh(&*backing);
    let log = start(&*backing);
    let streams = [Stream::Hot, Stream::Bulk, Stream::Bulk, Stream::Hot, Stream::Hot];
    for (number, stream) in streams.into_iter().enumerate() {
        let number = number as u64 + 1;
        let position = append(&log, stream, draft(number, number, number as u8));
        log.wait_written(&position).unwrap();
        let mut body = vec![0; PAGE];
        log.read(stream, &mut body, position.body_at).unwrap();
        assert_eq!(body, vec![number as u8; PAGE]);
    }
    let found = find(&*backing).unwrap();
    assert_eq!(numbers(&found), [1, 2, 3, 4, 5]);
    for record in &found.records {
        let number = record.draft.size;
        assert_eq!(found.body(record).unwrap(), vec![number as u8; number as usize * PAGE]);
        assert_eq!(record.draft.entries.len() as u64, number);
    }
    // Emptied, nothing is left; and numbers go on.
    let log = empty(found);
    assert!(numbers(&find(&*backing).unwrap()).is_empty());
    log.wait_written(&append(&log, Stream::Hot, draft(9, 1, 9))).unwrap();
    assert_eq!(numbers(&find(&*backing).unwrap()), [9]);
}

#[test]
fn laps_come_and_go() {
    let backing = MemoryBacking::new();
    fresh(&*backing);
    let log = start(&*backing);
    let mut random = Random::new(5);
    let mut live: Vec<(u64, Position)> = Vec::new();
    for number in 1..600 {
        let draft = draft(number, 1 + random.below(120), number as u8);
        match try_append(&log, Stream::Bulk, draft).unwrap() {
            Some(position) => live.push((number, position)),
            None => {
                let keep = random.below(live.len() as u64) as usize;
                let seq = live[keep].1.seq;
                log.trim([0, seq], false, seal).unwrap();
                live.drain(..keep);
                let mut body = vec![0; PAGE];
                log.wait_written(&live[0].1).unwrap();
                log.read(Stream::Bulk, &mut body, live[0].1.body_at).unwrap();
                assert_eq!(body, vec![live[0].0 as u8; PAGE]);
            }
        }
        log.wait_written(&live[live.len() - 1].1).unwrap();
        if number % 20 == 0 {
            let expected: Vec<u64> = live.iter().map(|(number, _)| *number).collect();
            assert_eq!(numbers(&find(&*backing).unwrap()), expected);
        }
    }
    let Usage { used, capacity } = log.usage(Stream::Bulk);
    assert!(used > 0 && used <= capacity);
}

#[test]
fn a_full_stream_makes_writers_wait_until_space_comes() {
    let backing = MemoryBacking::new();
    fresh(&*backing);
    let log = start(&*backing);
    let mut last = None;
    while let Some(position) = try_append(&log, Stream::Hot, draft(1, 100, 1)).unwrap() {
        last = Some(position);
    }
    log.wait_written(&last.unwrap()).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| log.reserve(Stream::Hot, 101, || Ok(())));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!waiting.is_finished());
        log.trim([last.unwrap().seq, 0], false, seal).unwrap();
        waiting.join().unwrap().unwrap();
    });
    assert!(try_append(&log, Stream::Hot, draft(2, 100, 2)).unwrap().is_some());
}

fn at_home(file: &FileRef) -> Home {
    Home { file: file.clone(), node: file.metadata().unwrap().id, failures: 0 }
}

#[test]
fn a_record_is_durable_when_its_home_is() {
    let memory = MemoryBacking::new();
    fresh(&*memory);
    let log = start(&*memory);
    let home = memory.root().create_unnamed().unwrap();
    memory.root().link_file(&*home, b"home").unwrap();
    memory.sync_fs().unwrap();
    let direct = |number| Draft { body: Vec::new(), ..draft(number, 1, 1) };
    let append_direct = |number| {
        let room = log.reserve(Stream::Bulk, 1, || Ok(())).unwrap();
        log.append(room, direct(number), Some(at_home(&home)), &session(1)).unwrap()
    };
    for (number, byte) in [(1, 7_u8), (2, 8)] {
        home.write_at(&[byte; 512], 0).unwrap();
        let position = append_direct(number);
        // Another file's flush of the other stream has nothing to do with it.
        log.wait_durable(&append(&log, Stream::Hot, draft(number, 1, 1))).unwrap();
        log.wait_durable(&position).unwrap();
        let trace = memory.trace();
        for crash in trace.crashes(trace.len(), &Options::default()) {
            let after = trace.materialise(&crash);
            let mut bytes = [0; 512];
            let file = after.root().lookup(b"home").unwrap().open(Access::Read).unwrap();
            file.read_at(&mut bytes, 0).unwrap();
            assert_eq!(bytes, [byte; 512], "{crash:?}");
        }
    }
    let (backing, faults) = FaultBacking::new(memory.clone());
    let home = backing.root().lookup(b"home").unwrap().open(Access::ReadWrite).unwrap();
    let room = log.reserve(Stream::Bulk, 1, || Ok(())).unwrap();
    let position = log.append(room, direct(3), Some(at_home(&home)), &session(1)).unwrap();
    faults.arm(Rule {
        call: Call::Sync,
        after: 0,
        lasting: false,
        errno: Errno::IO,
        partial: None,
    });
    assert_eq!(errno(log.wait_durable(&position)), Errno::IO);
    assert!(log.poisoned().is_some());
}

#[test]
fn a_flush_counts_only_if_none_beside_it_fails() {
    for fails in [false, true] {
        let backing = MemoryBacking::new();
        fresh(&*backing);
        let log = start(&*backing);
        let home = at_home(&backing.root().create_unnamed().unwrap());
        let node = home.node;
        let room = log.reserve(Stream::Bulk, 1, || Ok(())).unwrap();
        let direct = Draft { body: Vec::new(), ..draft(1, 1, 1) };
        let position = log.append(room, direct, Some(home), &session(1)).unwrap();
        std::thread::scope(|scope| {
            let log = &log;
            let (started, has_started) = channel();
            let (end, may_end) = channel::<()>();
            // As a checkpoint flushes the same file.
            let beside = scope.spawn(move || {
                let flush = || {
                    started.send(()).unwrap();
                    may_end.recv().unwrap();
                    if fails { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
                };
                let failed = |error: &io::Error| log.home_failed(Some(node), error);
                log.flush_of(Scope::Inode(node), flush, failed)
            });
            has_started.recv().unwrap();
            log.flush_of(Scope::Whole, || Ok(()), |_| ()).expect("something else");
            let commit = scope.spawn(|| log.wait_durable(&position));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!commit.is_finished(), "nobody knows yet what comes of the other");
            end.send(()).unwrap();
            assert_eq!(beside.join().unwrap().is_err(), fails);
            assert_eq!(commit.join().unwrap().is_err(), fails);
        });
        assert_eq!(log.poisoned().is_some(), fails);
        let after = log.flush_of(Scope::Stream(0), || Ok(()), |_| ());
        assert_eq!(after.is_err(), fails, "and from then on");
    }
}

#[test]
fn blocks_that_a_flush_has_failed_for_before_their_record_came_are_refused() {
    let backing = MemoryBacking::new();
    fresh(&*backing);
    let log = start(&*backing);
    let home = at_home(&backing.root().create_unnamed().unwrap());
    let direct = || Draft { body: Vec::new(), ..draft(1, 1, 1) };
    let room = || log.reserve(Stream::Bulk, 1, || Ok(())).unwrap();
    // They have been written, and nothing names them yet: a checkpoint hears of it.
    log.home_failed(Some(home.node), &io::ErrorKind::Other.into());
    assert!(log.poisoned().is_none(), "the checkpoint is made again");
    let refused = log.append(room(), direct(), Some(home.clone()), &session(1));
    assert_eq!(errno(refused), Errno::IO);
    let anew = Home { failures: log.home_failures(), ..home };
    let position = log.append(room(), direct(), Some(anew), &session(1)).unwrap();
    log.wait_durable(&position).unwrap();
}

#[test]
fn a_flush_that_panics_is_one_that_fails_and_holds_nobody_up() {
    let backing = MemoryBacking::new();
    fresh(&*backing);
    let log = start(&*backing);
    let failed = |error: &io::Error| log.poison(0, "it cannot be flushed", error);
    log.flush_of(Scope::Stream(0), || panic!("as ordered"), failed).unwrap_err();
    assert!(log.poisoned().is_some());
    log.flush_of(Scope::Stream(0), || Ok(()), |_| ()).unwrap_err();
}

#[test]
fn waiters_share_writes_and_flushes() {
    let backing = MemoryBacking::new();
    fresh(&*backing);
    let log = start(&*backing);
    let before = backing.position();
    let positions: Vec<Position> =
        (0..20).map(|number| append(&log, Stream::Hot, draft(number, 1, 1))).collect();
    std::thread::scope(|scope| {
        for position in &positions {
            let log = &log;
            scope.spawn(move || log.wait_durable(position).unwrap());
        }
    });
    // One write, one flush, or a few when threads started late: never one for each.
    let calls = backing.position() - before;
    assert!((2..=8).contains(&calls), "{calls} calls");
    assert_eq!(find(&*backing).unwrap().records.len(), 20);
}

/// Notes of who was told what of which record, and how much had been done to the disk by then.
type Told = Arc<Mutex<Vec<(u64, FsResult<()>, usize)>>>;

fn tell(
    told: &Told,
    disk: &Arc<MemoryBacking>,
    number: u64,
) -> Box<dyn FnOnce(FsResult<()>) + Send> {
    let (told, disk) = (Arc::clone(told), Arc::clone(disk));
    Box::new(move |result| told.lock().push((number, result, disk.position())))
}

#[test]
fn who_waits_without_a_thread_is_told_when_it_is_durable() {
    for failing in [false, true] {
        let memory = MemoryBacking::new();
        fresh(&*memory);
        let (backing, faults) = FaultBacking::new(memory.clone());
        let log = start(&*backing);
        let told = Told::default();
        let written = |log: &Arc<Log>, number| {
            let position = append(log, Stream::Hot, draft(number, 1, 1));
            log.wait_written(&position).unwrap();
            log.pending_flush(Stream::Hot, position.seq).unwrap()
        };
        let (one, two) = (written(&log, 1), written(&log, 2));
        let during = {
            let (log, told, memory) = (Arc::clone(&log), Arc::clone(&told), Arc::clone(&memory));
            move || {
                two.then(|_| panic!("as ordered"), &mut || {});
                let three = written(&log, 3);
                three.then(tell(&told, &memory, 3), &mut || {});
                assert!(told.lock().is_empty(), "nothing is durable yet");
            }
        };
        faults.arm_hook(Call::Sync, during);
        if failing {
            let errno = Errno::NOSPC;
            faults.arm(Rule { call: Call::Sync, after: 0, lasting: false, errno, partial: None });
        }
        let flushes = memory.position();
        one.then(tell(&told, &memory, 1), &mut || {});
        let told = std::mem::take(&mut *told.lock());
        assert_eq!(told.iter().map(|(number, ..)| *number).collect::<Vec<_>>(), [1, 3]);
        if failing {
            for (_, result, _) in told {
                assert_eq!(errno(result), Errno::IO);
            }
            assert!(log.poisoned().is_some());
            let last = log.next_seqs()[0] - 1;
            let late = log.pending_flush(Stream::Hot, last).unwrap();
            assert_eq!(errno(late.wait()), Errno::IO);
            continue;
        }
        // The write of the third and two flushes: the first did not cover it.
        assert_eq!(memory.position() - flushes, 3);
        for (number, result, position) in told {
            result.unwrap();
            for crash in memory.trace().crashes(position, &Options::default()) {
                let kept = numbers(&find(&*memory.trace().materialise(&crash)).unwrap());
                assert!(kept.contains(&number), "{number} is not in {kept:?} after {crash:?}");
            }
        }
        assert!(log.pending_flush(Stream::Hot, log.next_seqs()[0] - 1).is_none());
    }
}

/// A flush that runs covers the note, but who attends to it waits for more.
#[test]
fn who_is_told_does_not_wait_for_a_flush_too_many() {
    let memory = MemoryBacking::new();
    fresh(&*memory);
    let (backing, faults) = FaultBacking::new(memory.clone());
    let log = start(&*backing);
    let told = Told::default();
    let written = |number| {
        let position = append(&log, Stream::Hot, draft(number, 1, 1));
        log.wait_written(&position).unwrap();
        position
    };
    let pending = |position: &Position| log.pending_flush(Stream::Hot, position.seq).unwrap();
    let (begun, has_begun) = channel();
    let (end_first, first_may_end) = channel::<()>();
    let (end_second, second_may_end) = channel::<()>();
    let (again, begun_again) = (faults.clone(), begun.clone());
    faults.arm_hook(Call::Sync, move || {
        again.arm_hook(Call::Sync, move || {
            begun_again.send(2).unwrap();
            second_may_end.recv().unwrap();
        });
        begun.send(1).unwrap();
        first_may_end.recv().unwrap();
    });
    let one = written(1);
    std::thread::scope(|scope| {
        // Ends with this, whatever happens in it.
        let (end_first, end_second) = (end_first, end_second);
        scope.spawn(|| log.wait_durable(&one).unwrap());
        assert_eq!(has_begun.recv().unwrap(), 1);
        let two = written(2);
        // Who is called first when the round is over, and begins the next one.
        let (log, two) = (&log, two);
        scope.spawn(move || log.wait_durable(&two).unwrap());
        std::thread::sleep(Duration::from_millis(50));
        let (attended, tell_two) = (pending(&two), tell(&told, &memory, 2));
        scope.spawn(move || attended.then(tell_two, &mut || {}));
        std::thread::sleep(Duration::from_millis(50));
        pending(&one).then(tell(&told, &memory, 1), &mut || {});
        end_first.send(()).unwrap();
        assert_eq!(has_begun.recv().unwrap(), 2);
        let deadline = std::time::Instant::now() + Duration::from_secs(90);
        while told.lock().is_empty() {
            assert!(std::time::Instant::now() < deadline, "nobody is told");
            std::thread::sleep(Duration::from_millis(1));
        }
        end_second.send(()).unwrap();
    });
    let told: Vec<u64> = told.lock().iter().map(|(number, ..)| *number).collect();
    assert_eq!(told, [1, 2]);
}

#[test]
fn nobody_is_told_that_all_is_well_once_the_log_has_failed() {
    for during_the_flush in [true, false] {
        let memory = MemoryBacking::new();
        fresh(&*memory);
        let (backing, faults) = FaultBacking::new(memory.clone());
        let log = start(&*backing);
        let told = Told::default();
        let written = |number| {
            let position = append(&log, Stream::Hot, draft(number, 1, 1));
            log.wait_written(&position).unwrap();
            log.pending_flush(Stream::Hot, position.seq).unwrap()
        };
        let fail = {
            let log = Arc::clone(&log);
            move || log.flush_failed("a file", &io::Error::other("as ordered"))
        };
        let one = written(1);
        if during_the_flush {
            faults.arm_hook(Call::Sync, fail);
            one.then(tell(&told, &memory, 1), &mut || {});
        } else {
            // It fails while the first is told; the second, which no flush covers yet, waits.
            let (notes, disk, log) = (Arc::clone(&told), Arc::clone(&memory), Arc::clone(&log));
            faults.arm_hook(Call::Sync, move || {
                let late = append(&log, Stream::Hot, draft(3, 1, 1));
                log.wait_written(&late).unwrap();
                let rest = log.pending_flush(Stream::Hot, late.seq).unwrap();
                rest.then(tell(&notes, &disk, 2), &mut || {});
            });
            let told = move |result: FsResult<()>| {
                result.unwrap();
                fail();
            };
            one.then(told, &mut || {});
        }
        let told = std::mem::take(&mut *told.lock());
        assert!(!told.is_empty());
        for (number, result, _) in told {
            assert_eq!(errno(result), Errno::IO, "{number}, {during_the_flush}");
        }
    }
}

#[test]
fn many_threads_and_both_streams() {
    let backing = MemoryBacking::new();
    fresh(&*backing);
    let log = start(&*backing);
    std::thread::scope(|scope| {
        for thread in 0..8_u64 {
            let log = &log;
            scope.spawn(move || {
                for i in 0..40 {
                    let stream = if i % 3 == 0 { Stream::Bulk } else { Stream::Hot };
                    let position = append(log, stream, draft(thread * 1000 + i, 1, thread as u8));
                    match i % 5 {
                        0 => log.wait_durable(&position).unwrap(),
                        1 => log.wait_on_device(&position).unwrap(),
                        2 => {
                            let (tell, told) = std::sync::mpsc::channel();
                            log.wait_written(&position).unwrap();
                            if let Some(rest) = log.pending_flush(stream, position.seq) {
                                rest.then(move |result| tell.send(result).unwrap(), &mut || {});
                                told.recv().unwrap().unwrap();
                            }
                        }
                        _ => log.wait_written(&position).unwrap(),
                    }
                }
            });
        }
    });
    let found = find(&*backing).unwrap();
    let mut next = HashMap::new();
    for number in numbers(&found) {
        let expected = next.entry(number / 1000).or_insert(0);
        assert_eq!(number % 1000, *expected, "a thread's records keep their order");
        *expected += 1;
    }
    assert_eq!(found.records.len(), 320);
}

#[test]
fn a_failed_write_or_flush_poisons_for_good() {
    for (call, partial) in [(Call::Write, None), (Call::Write, Some(5000)), (Call::Sync, None)] {
        let memory = MemoryBacking::new();
        fresh(&*memory);
        let (backing, faults) = FaultBacking::new(memory.clone());
        let log = start(&*backing);
        let first = append(&log, Stream::Hot, draft(1, 1, 1));
        log.wait_durable(&first).unwrap();
        let rule = Rule { call, after: 0, lasting: false, errno: Errno::NOSPC, partial };
        faults.arm(rule);
        let second = append(&log, Stream::Hot, draft(2, 1, 2));
        assert_eq!(errno(log.wait_durable(&second)), Errno::IO);
        assert_eq!(errno(log.wait_durable(&second)), Errno::IO, "not tried again");
        assert_eq!(errno(try_append(&log, Stream::Bulk, draft(3, 1, 3))), Errno::IO);
        assert_eq!(errno(log.trim([1, 1], false, seal)), Errno::IO);
        assert!(log.poisoned().unwrap().contains("log.hot"));
        log.wait_durable(&first).unwrap();
        let kept = numbers(&find(&*memory).unwrap());
        assert_eq!(kept, if call == Call::Sync { vec![1, 2] } else { vec![1] });
    }
}

#[test]
fn a_request_that_is_lost_between_place_and_mac_poisons() {
    let backing = MemoryBacking::new();
    fresh(&*backing);
    let log = start(&*backing);
    let seq = log.streams.lock().queues[0].place(2, None).seq;
    let after = append(&log, Stream::Hot, draft(1, 1, 1));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| log.wait_written(&after));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!waiting.is_finished());
        drop(commit::Slot::new(&log, 0, seq));
        assert_eq!(errno(waiting.join().unwrap()), Errno::IO);
    });
}

#[test]
fn a_missing_foreign_or_damaged_log_is_refused() {
    let backing = MemoryBacking::new();
    fresh(&*backing);
    let root = backing.root();
    let find_by = |id: &[u8; 16], keys: MacKeys| {
        Log::find(&at(&root), id, Proof::Keys(&keys, &sessions), Access::Read)
    };
    assert_eq!(find_by(&[4; 16], anchor_key()).unwrap_err().kind, crate::Kind::Corrupt);
    assert!(find_by(&ID, anchor_key_of(9)).is_err());

    let log = start(&*backing);
    let positions: Vec<Position> =
        (1..=5).map(|number| append(&log, Stream::Hot, draft(number, 2, 1))).collect();
    log.wait_durable(&positions[2]).unwrap();
    log.wait_durable(&append(&log, Stream::Hot, draft(6, 1, 1))).unwrap();
    log.wait_durable(&append(&log, Stream::Hot, draft(7, 1, 1))).unwrap();
    let file = root.lookup(FILES[0]).unwrap().open(Access::ReadWrite).unwrap();
    let flip = |at: u64| {
        let mut byte = [0];
        file.read_at(&mut byte, at).unwrap();
        file.write_at(&[byte[0] ^ 1], at).unwrap();
    };
    // One that was durable when a later one was written: damage.
    flip(positions[1].body_at + 5000);
    assert_eq!(find(&*backing).unwrap_err().kind, crate::Kind::Corrupt);
    flip(positions[1].body_at + 5000);
    assert_eq!(numbers(&find(&*backing).unwrap()), [1, 2, 3, 4, 5, 6, 7]);
    // One copy of the anchor is enough, none is not.
    flip(20);
    assert!(find(&*backing).unwrap().damaged_copy);
    flip(PAGE as u64 + 20);
    assert!(find(&*backing).is_err());
    root.unlink(FILES[0]).unwrap();
    let missing = find(&*backing).unwrap_err();
    assert!(missing.kind == crate::Kind::Corrupt && missing.to_string().contains("missing"));
}

#[test]
fn what_follows_a_record_that_the_crash_took_from_the_other_stream_goes_too() {
    let backing = MemoryBacking::new();
    fresh(&*backing);
    let log = start(&*backing);
    let durable = append(&log, Stream::Bulk, draft(1, 1, 1));
    log.wait_durable(&durable).unwrap();
    let lost = append(&log, Stream::Bulk, draft(2, 1, 1));
    let follow = |number, other: &Position| Draft { other: other.seq, ..draft(number, 1, 1) };
    log.wait_durable(&append(&log, Stream::Hot, follow(3, &durable))).unwrap();
    log.wait_durable(&append(&log, Stream::Hot, follow(4, &lost))).unwrap();
    log.wait_durable(&append(&log, Stream::Hot, draft(5, 1, 1))).unwrap();
    let stranger = Draft { file_id: [8; 16], ..draft(6, 1, 1) };
    log.wait_durable(&append(&log, Stream::Hot, stranger)).unwrap();
    assert_eq!(numbers(&find(&*backing).unwrap()), [1, 3, 6]);
}

/// Whatever the crash: what was acknowledged is there, what is there is a prefix of each stream,
/// every body is whole, and the recovered log works, through a second crash too.
#[test]
fn every_crash_leaves_a_prefix_with_all_that_was_durable() {
    for seed in 0..2 {
        let backing = MemoryBacking::new();
        fresh(&*backing);
        backing.settle();
        let log = start(&*backing);
        let mut random = Random::new(seed);
        // (trace position, number) of durable records; trims likewise.
        let mut durable: Vec<(usize, u64)> = Vec::new();
        let mut trims: Vec<(usize, u64)> = Vec::new();
        let mut all = Vec::new();
        for number in 1..=14_u64 {
            let position =
                append(&log, Stream::Hot, draft(number, 1 + random.below(3), number as u8));
            all.push(position);
            match random.below(5) {
                0 => {}
                1..=2 => log.wait_written(&position).unwrap(),
                3 => {
                    log.wait_durable(&position).unwrap();
                    durable.push((backing.position(), number));
                }
                _ => {
                    log.wait_durable(&position).unwrap();
                    durable.push((backing.position(), number));
                    let upto = random.below(number) + 1;
                    trims.push((backing.position(), upto));
                    log.trim([all[upto as usize - 1].seq, 0], false, seal).unwrap();
                }
            }
        }
        let trace = backing.trace();
        let options = Options { budget: 16, seed, ..Options::default() };
        for cut in 0..=trace.len() {
            let must = durable.iter().filter(|(at, _)| *at <= cut).map(|(_, number)| *number).max();
            let gone = trims.iter().filter(|(at, _)| *at < cut).map(|(_, upto)| *upto).max();
            for crash in trace.crashes(cut, &options) {
                let after = trace.materialise(&crash);
                let found = find(&*after).unwrap_or_else(|error| panic!("{crash:?}: {error}"));
                let there = numbers(&found);
                assert!(there.windows(2).all(|pair| pair[1] == pair[0] + 1), "{crash:?} {there:?}");
                let first = there.first().copied().unwrap_or(u64::MAX);
                assert!(there.is_empty() || first <= gone.unwrap_or(1), "{crash:?} {there:?}");
                if let Some(must) = must {
                    assert!(there.last() >= Some(&must), "{crash:?}: {must} is not in {there:?}");
                }
                for record in &found.records {
                    let body = found.body(record).unwrap();
                    assert!(body.iter().all(|&byte| byte == record.draft.size as u8));
                }
                if random.below(60) != 0 {
                    continue;
                }
                second_life(&after, &there);
            }
        }
    }
}

/// Recovery and two more records; a crash at any point of it leaves the old records or the new.
fn second_life(backing: &MemoryBacking, old: &[u64]) {
    let log = start(backing);
    let recovered = backing.position();
    log.wait_durable(&append(&log, Stream::Hot, draft(101, 1, 101))).unwrap();
    let first = backing.position();
    log.wait_written(&append(&log, Stream::Hot, draft(102, 1, 102))).unwrap();
    let trace = backing.trace();
    let options = Options { budget: 12, ..Options::default() };
    for cut in 0..=trace.len() {
        for crash in trace.crashes(cut, &options) {
            let there = numbers(&find(&*trace.materialise(&crash)).unwrap());
            let fine = match cut {
                cut if cut >= first => there == [101] || there == [101, 102],
                cut if cut >= recovered => there.is_empty() || there == [101],
                _ => there == old || there.is_empty(),
            };
            assert!(fine, "{crash:?}: {there:?}, before {old:?}");
        }
    }
}

/// The same with a flush left out must be found out.
#[test]
fn a_forgotten_flush_is_found_out() {
    let backing = MemoryBacking::new();
    fresh(&*backing);
    let log = start(&*backing);
    backing.settle();
    log.wait_durable(&append(&log, Stream::Hot, draft(1, 1, 1))).unwrap();
    let trace = backing.trace();
    let is_lost = |trace: &crate::backing::memory::Trace| {
        let crashes = trace.crashes(trace.len(), &Options::default());
        crashes.iter().any(|crash| numbers(&find(&*trace.materialise(crash)).unwrap()).is_empty())
    };
    assert!(!is_lost(&trace));
    assert!(is_lost(&trace.without(trace.syncs()[0])));
}
