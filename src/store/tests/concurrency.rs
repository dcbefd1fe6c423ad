//! Many threads on one file.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::support::{Volume, pattern, read_all};
use crate::store::file::Durability;
use crate::store::layout::{BLOCK_LEN, GROUP_PLAIN};

/// Spans two groups, unaligned at both ends.
const AT: u64 = GROUP_PLAIN - 20_000;
const LEN: usize = 50_001;

#[test]
fn every_read_sees_some_whole_write() {
    let volume = Volume::new();
    let file = volume.create("f");
    file.write_at(&vec![0; LEN], AT, Durability::default()).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let mut buf = vec![0xee; LEN];
                    let mut reads = 0;
                    while !done.load(Ordering::Relaxed) {
                        assert_eq!(file.read_at(&mut buf, AT).unwrap(), LEN);
                        assert!(buf.iter().all(|&byte| byte == buf[0]), "a torn read");
                        reads += 1;
                    }
                    reads
                })
            })
            .collect();
        let writers: Vec<_> = (1..=3_u8)
            .map(|writer| {
                let file = &file;
                scope.spawn(move || {
                    for round in 0..150 {
                        let byte = writer * 64 + round % 60;
                        file.write_at(&vec![byte; LEN], AT, Durability::default()).unwrap();
                    }
                })
            })
            .collect();
        // This one stays out of their way, and comes and goes.
        for round in 0..100 {
            file.write_at(&[7; 5000], 2 * GROUP_PLAIN + round * 5000, Durability::default())
                .unwrap();
            if round % 10 == 0 {
                file.truncate(AT + LEN as u64).unwrap();
            }
        }
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        done.store(true, Ordering::Relaxed);
        let reads: u64 = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
        assert!(reads > 0);
    });
}

#[test]
fn writes_that_extend_a_file_side_by_side_lose_nothing() {
    let volume = Volume::new();
    let file = volume.create("f");
    let total = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let (file, total) = (&file, &total);
            scope.spawn(move || {
                for round in 0..200_usize {
                    let len = 1 + (round * 37 + usize::from(thread) * 1000) % 5000;
                    let data = vec![thread + 1; len];
                    let at = total.fetch_add(len as u64, Ordering::Relaxed);
                    file.write_at(&data, at, Durability::default()).unwrap();
                    let mut back = vec![0; len];
                    assert_eq!(file.read_at(&mut back, at).unwrap(), len);
                    assert_eq!(back, data);
                }
            });
        }
    });
    assert_eq!(file.size(), total.into_inner());
    assert!(read_all(&file).iter().all(|&byte| (1..=4).contains(&byte)));
}

#[test]
fn one_inode_is_one_file() {
    let volume = Volume::new();
    drop(volume.create("f"));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for round in 0..200 {
                    let (a, b) = (volume.open("f"), volume.open("f"));
                    assert!(Arc::ptr_eq(&a, &b));
                    a.write_at(&pattern(BLOCK_LEN, 1), round % 3, Durability::default()).unwrap();
                }
            });
        }
    });
    assert_eq!(read_all(&volume.open("f")).len(), BLOCK_LEN + 2);
}
