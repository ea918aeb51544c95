//! Tables that drivers make, and tables that no driver makes.

use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::memory::tests::{MIB, memory};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const TABLE: u64 = 64 << 10;

#[derive(Clone, Copy, Debug)]
struct Entry(u64, u32, u16, u16);

fn put(memory: &GuestMemory, table: u64, entries: &[Entry]) {
    for (i, Entry(address, length, flags, next)) in entries.iter().enumerate() {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        // Beyond the memory there is nothing to put.
        let _ = memory
            .map()
            .write_slice(&bytes, GuestAddress(table + i as u64 * 16));
    }
}

fn walked(memory: &Arc<GuestMemory>, size: u16, head: u16) -> Result<(usize, usize), ChainError> {
    let table = Window::new(memory.clone(), TABLE, usize::from(size) * 16, 16).unwrap();
    let mut buffers = Buffers::new(memory.clone());
    walk(&table, size, head, &mut buffers)?;
    Ok((buffers.readable(), buffers.writable()))
}

#[test]
fn chains_are_followed() {
    let memory = memory();
    put(
        &memory,
        TABLE,
        &[
            Entry(0, 10, NEXT, 2),
            Entry(0, 0, 0, 0),
            Entry(50, 20, NEXT, 3),
            Entry(MIB - 5, 30, WRITE, 9),
        ],
    );
    assert_eq!(walked(&memory, 4, 0), Ok((30, 30)));
    assert_eq!(walked(&memory, 4, 3), Ok((0, 30)));
    assert_eq!(walked(&memory, 4, 1), Ok((0, 0)), "an empty buffer is no error");
}

#[test]
fn indirect_tables_are_followed_even_across_regions() {
    let memory = memory();
    let entries: Vec<Entry> = (0..100)
        .map(|i| Entry(4096 * i, 4096, WRITE | NEXT, i as u16 + 1))
        .collect();
    let mut entries = entries;
    entries[99].2 = WRITE;
    for table in [TABLE + 4096, MIB - 800] {
        put(&memory, table, &entries);
        put(
            &memory,
            TABLE,
            &[Entry(0, 40, NEXT, 1), Entry(table, 1600, INDIRECT, 0)],
        );
        assert_eq!(walked(&memory, 2, 0), Ok((40, 409_600)));
    }
}

#[test]
fn hostile_chains_are_refused() {
    let memory = memory();
    let refused = |entries: &[Entry]| {
        put(&memory, TABLE, entries);
        walked(&memory, 4, 0).unwrap_err()
    };
    assert_eq!(refused(&[Entry(0, 1, NEXT, 0)]), ChainError::Loop);
    assert_eq!(
        refused(&[Entry(0, 1, NEXT, 1), Entry(0, 1, NEXT, 0)]),
        ChainError::Loop
    );
    assert_eq!(refused(&[Entry(0, 1, NEXT, 4)]), ChainError::BadIndex(4));
    assert_eq!(
        refused(&[Entry(0, 1, NEXT | WRITE, 1), Entry(0, 1, 0, 0)]),
        ChainError::Order
    );
    assert_eq!(refused(&[Entry(0, 32, INDIRECT | NEXT, 1)]), ChainError::Indirect);
    assert_eq!(refused(&[Entry(0, 17, INDIRECT, 0)]), ChainError::Indirect);
    assert_eq!(refused(&[Entry(0, 0, INDIRECT, 0)]), ChainError::Indirect);
    assert_eq!(refused(&[Entry(0, !15, INDIRECT, 0)]), ChainError::Indirect);
    assert!(matches!(
        refused(&[Entry(3 * MIB, 32, INDIRECT, 0)]),
        ChainError::Unmapped(_)
    ));
    assert!(matches!(
        refused(&[Entry(2 * MIB - 1, 2, 0, 0)]),
        ChainError::Unmapped(_)
    ));
    assert_eq!(refused(&[Entry(0, u32::MAX, 0, 0)]), ChainError::TooLong);
    put(&memory, 4096, &[Entry(8192, 16, INDIRECT, 0)]);
    assert_eq!(
        refused(&[Entry(4096, 16, INDIRECT, 0)]),
        ChainError::Indirect,
        "nested tables"
    );
    assert_eq!(walked(&memory, 4, 4), Err(ChainError::BadIndex(4)));
}

fn entry() -> impl Strategy<Value = Entry> {
    let address = prop_oneof![
        0..10 * MIB,
        (0u64..200).prop_map(|i| i * 4096),
        Just(u64::MAX - 5),
        Just(TABLE)
    ];
    let length = prop_oneof![0u32..9000, (0u32..40).prop_map(|i| i * 16), any::<u32>()];
    (address, length, 0u16..8, 0u16..20).prop_map(|(a, l, f, n)| Entry(a, l, f, n))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_table_harms(direct in proptest::collection::vec(entry(), 16), nested in proptest::collection::vec(entry(), 16), head in 0u16..18) {
        let memory = memory();
        put(&memory, TABLE, &direct);
        put(&memory, 4096, &nested);
        let table = Window::new(memory.clone(), TABLE, 256, 16).unwrap();
        let mut buffers = Buffers::new(memory.clone());
        let result = walk(&table, 16, head, &mut buffers);
        prop_assert!(buffers.readable() <= 8 << 20 && buffers.writable() <= 8 << 20);
        if result.is_ok() {
            // What was found can be used to its end.
            let mut bytes = Vec::new();
            prop_assert_eq!(buffers.copy_in(0, usize::MAX, &mut bytes), buffers.readable());
            prop_assert_eq!(buffers.copy_out(0, &vec![0; buffers.writable()]), buffers.writable());
        }
    }
}
