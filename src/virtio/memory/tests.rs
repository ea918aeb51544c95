//! Guest memory, its log, and (with hostile tables) the chains that lead to it.

use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use fuse_backend_rs::api::filesystem::{ZeroCopyReader, ZeroCopyWriter};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;

pub const MIB: u64 = 1 << 20;
/// Two neighbours, a hole, and one more region.
const REGIONS: [(u64, usize); 3] = [(0, MIB as usize), (MIB, MIB as usize), (8 * MIB, MIB as usize)];

pub fn memory() -> Arc<GuestMemory> {
    memory_with(Arc::default())
}

fn memory_with(log: Arc<DirtyLog>) -> Arc<GuestMemory> {
    let regions: Vec<_> = REGIONS
        .iter()
        .map(|(start, size)| (GuestAddress(*start), *size))
        .collect();
    Arc::new(GuestMemory::new(
        GuestMemoryMmap::from_ranges(&regions).unwrap(),
        log,
    ))
}

#[test]
fn buffers_may_span_regions_but_not_holes() {
    let memory = memory();
    let mut buffers = Buffers::new(memory.clone());
    buffers.push_readable(MIB - 100, 200).unwrap();
    buffers.push_writable(0, 2 * MIB as usize).unwrap();
    assert_eq!((buffers.readable(), buffers.writable()), (200, 2 << 20));
    for (address, length) in [
        (2 * MIB - 10, 11),
        (2 * MIB, 1),
        (9 * MIB, 1),
        (u64::MAX, 2),
        (7 * MIB, 2 << 20),
    ] {
        let mut buffers = Buffers::new(memory.clone());
        assert!(
            buffers.push_readable(address, length).is_err(),
            "{address:#x}+{length}"
        );
    }
    assert!(
        Buffers::new(memory).push_writable(5 * MIB, 0).is_ok(),
        "nothing is everywhere"
    );
}

#[test]
fn bytes_go_to_and_come_from_where_the_guest_says() {
    let memory = memory();
    let data: Vec<u8> = (0..10_000u32).map(|i| (i % 249) as u8).collect();
    let mut buffers = Buffers::new(memory.clone());
    for (address, length) in [(100, 3), (MIB - 4000, 8000), (8 * MIB, 1997)] {
        buffers.push_readable(address, length).unwrap();
        buffers.push_writable(address, length).unwrap();
    }
    assert_eq!(buffers.writer(0, usize::MAX).write(&data).unwrap(), 10_000);
    let mut there = vec![0; 8000];
    memory
        .map()
        .read_slice(&mut there, GuestAddress(MIB - 4000))
        .unwrap();
    assert_eq!(there, data[3..8003]);

    let mut back = Vec::new();
    buffers.reader(0, usize::MAX).read_to_end(&mut back).unwrap();
    assert_eq!(back, data);
    back.clear();
    buffers.reader(2, 4001).read_to_end(&mut back).unwrap();
    assert_eq!(back, data[2..4003]);
    assert_eq!(buffers.copy_out(9_998, &[1, 2, 3]), 2);
    let mut copied = vec![9];
    assert_eq!(buffers.copy_in(7_000, 5_000, &mut copied), 3_000);
    assert_eq!(copied[1..2999], data[7_000..9_998]);
}

#[test]
fn files_are_read_and_written_without_a_copy_of_ours() {
    let memory = memory();
    let mut file = tempfile::tempfile().unwrap();
    let data: Vec<u8> = (0..500_000u32).map(|i| (i % 241) as u8).collect();
    file.write_all(&data).unwrap();
    let mut buffers = Buffers::new(memory);
    for page in 0..100 {
        // Every second page, so that nothing can be merged.
        buffers.push_writable(page * 8192, 4096).unwrap();
        buffers.push_readable(page * 8192, 4096).unwrap();
    }
    let mut writer = buffers.writer(16, 300_000);
    assert_eq!(writer.available_bytes(), 300_000);
    assert_eq!(writer.write_from(&mut file, 100_001, 7).unwrap(), 100_001);
    assert_eq!(
        writer.write_from(&mut file, usize::MAX, 100_008).unwrap(),
        199_999
    );
    assert_eq!((writer.written(), writer.available_bytes()), (300_000, 0));
    let mut copied = Vec::new();
    buffers.copy_in(16, 300_000, &mut copied);
    assert_eq!(copied, data[7..300_007]);

    let mut out = tempfile::tempfile().unwrap();
    let mut reader = buffers.reader(16, 300_000);
    assert_eq!(reader.read_to(&mut out, 5, 0).unwrap(), 5);
    assert_eq!(reader.read_to(&mut out, usize::MAX, 5).unwrap(), 299_995);
    let mut back = Vec::new();
    out.rewind().unwrap();
    out.read_to_end(&mut back).unwrap();
    assert_eq!(back, data[7..300_007]);
}

#[test]
fn more_buffers_than_one_system_call_takes() {
    let memory = memory();
    let mut file = tempfile::tempfile().unwrap();
    let data: Vec<u8> = (0..3000u32).map(|i| (i % 251) as u8).collect();
    file.write_all(&data).unwrap();
    let mut buffers = Buffers::new(memory);
    for i in 0..3000 {
        buffers.push_writable(i * 2, 1).unwrap();
        buffers.push_readable(i * 2, 1).unwrap();
    }
    let mut writer = buffers.writer(0, usize::MAX);
    assert_eq!(writer.write_from(&mut file, 3000, 0).unwrap(), 3000);
    assert_eq!(writer.available_bytes(), 0);
    let mut copied = Vec::new();
    buffers.copy_in(0, 3000, &mut copied);
    assert_eq!(copied, data);

    let mut out = tempfile::tempfile().unwrap();
    assert_eq!(buffers.reader(0, 3000).read_to(&mut out, 2999, 0).unwrap(), 2999);
    let mut back = Vec::new();
    out.rewind().unwrap();
    out.read_to_end(&mut back).unwrap();
    assert_eq!(back, data[..2999]);

    // A file that ends within the second vector.
    assert_eq!(
        buffers
            .writer(0, usize::MAX)
            .write_from(&mut file, 3000, 1500)
            .unwrap(),
        1500
    );
    assert_eq!(
        buffers
            .writer(0, usize::MAX)
            .write_from(&mut file, 3000, 3000 - 1024)
            .unwrap(),
        1024
    );
    assert_eq!(
        buffers
            .writer(0, usize::MAX)
            .write_from(&mut file, 3000, 3000)
            .unwrap(),
        0
    );
}

fn log_file(bytes: u64) -> std::fs::File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file
}

fn dirty_pages(file: &std::fs::File) -> Vec<u64> {
    let mut bytes = Vec::new();
    let mut file = file.try_clone().unwrap();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    let set = |page: &u64| bytes[(page >> 3) as usize] & 1 << (page & 7) != 0;
    (0..bytes.len() as u64 * 8).filter(set).collect()
}

#[test]
fn exactly_the_pages_written_are_marked() {
    let log = Arc::new(DirtyLog::default());
    let memory = memory_with(log.clone());
    let file = log_file(1024);
    let mut buffers = Buffers::new(memory.clone());
    buffers.push_writable(4096 * 3 + 4000, 97).unwrap();
    buffers.push_writable(8 * MIB, 100).unwrap();
    buffers.copy_out(0, &[1; 197]);
    log.set_map(file.as_fd().try_clone_to_owned().unwrap(), 0, 1024)
        .unwrap();
    buffers.copy_out(0, &[1; 197]);
    assert_eq!(
        dirty_pages(&file),
        Vec::<u64>::new(),
        "nothing is marked before it is asked for"
    );

    log.set_wanted(true);
    buffers.copy_out(0, &[1; 96]);
    assert_eq!(dirty_pages(&file), [3]);
    buffers.writer(90, 7).write_all(&[1; 7]).unwrap();
    assert_eq!(dirty_pages(&file), [3, 4]);
    let mut source = tempfile::tempfile().unwrap();
    source.write_all(&[2; 10]).unwrap();
    buffers.writer(97, 100).write_from(&mut source, 100, 0).unwrap();
    assert_eq!(dirty_pages(&file), [3, 4, 2048]);
    Window::new(memory.clone(), MIB, 8192, 2)
        .unwrap()
        .store_u16(4094, 1, Ordering::Relaxed);
    assert_eq!(dirty_pages(&file), [3, 4, 256, 2048]);

    let next = log_file(1024);
    log.set_map(next.as_fd().try_clone_to_owned().unwrap(), 0, 1024)
        .unwrap();
    buffers.copy_out(0, &[1; 1]);
    assert_eq!(dirty_pages(&next), [3]);
    log.set_wanted(false);
    buffers.copy_out(97, &[1; 1]);
    assert_eq!(dirty_pages(&next), [3]);
    assert!(
        log.set_map(file.into(), 512, 1024).is_err(),
        "a log beyond its file"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn cutting_a_vector_loses_no_byte(
        pieces in proptest::collection::vec((0u64..200, 1usize..5000), 1..20),
        offset in 0usize..20_000,
        steps in proptest::collection::vec(0usize..9000, 1..10),
    ) {
        let memory = memory();
        let mut buffers = Buffers::new(memory.clone());
        let mut all = Vec::new();
        for (i, (page, length)) in pieces.iter().enumerate() {
            let address = page * 5000;
            memory.map().write_slice(&vec![i as u8 + 1; *length], GuestAddress(address)).unwrap();
            buffers.push_readable(address, *length).unwrap();
        }
        buffers.copy_in(0, usize::MAX, &mut all);
        let total = buffers.readable();
        let mut reader = buffers.reader(offset, usize::MAX);
        let mut at = offset.min(total);
        for step in steps {
            let mut part = vec![0; step];
            let count = reader.read(&mut part).unwrap();
            prop_assert_eq!(count, step.min(total - at));
            prop_assert_eq!(&part[..count], &all[at..at + count]);
            at += count;
        }
    }
}
