//! Changes of an image: fields, wherever there are some, get values that are likely to matter.

use crate::script::Script;

/// Most changes of one input.
const MAX_CHANGES: usize = 48;
/// Largest image that a change makes.
const MAX_SIZE: usize = 256 << 10;

/// Where fields are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) offset: usize,
    pub(crate) size: usize,
}

/// Bytes, and where their fields are.
#[derive(Clone)]
pub(crate) struct Subject {
    pub(crate) bytes: Vec<u8>,
    /// Superblocks and tables: few, and everything depends on them.
    pub(crate) heads: Vec<Region>,
    /// Inodes, directory blocks, chunk records.
    pub(crate) bodies: Vec<Region>,
}

impl Subject {
    /// Changes the bytes as `script` says.
    pub(crate) fn change(&mut self, script: &mut Script<'_>) {
        for _ in 0..MAX_CHANGES {
            if script.is_empty() || self.bytes.is_empty() {
                return;
            }
            match script.u8() % 16 {
                0..=10 => self.set_field(script),
                11 | 12 => {
                    let at = script.u32() as usize % self.bytes.len();
                    self.bytes[at] = script.u8();
                }
                13 => {
                    let size = usize::from(script.u8());
                    let (from, to) = (self.position(script), self.position(script));
                    let size = size.min(self.bytes.len() - from.max(to));
                    self.bytes.copy_within(from..from + size, to);
                }
                14 => {
                    let size = (self.bytes.len() + usize::from(script.u16())).min(MAX_SIZE);
                    let fill = script.u8();
                    self.bytes.resize(size.max(self.bytes.len()), fill);
                }
                _ => {
                    // Rarely, because little is left then.
                    if script.u8() == 0xFF {
                        let size = script.u32() as usize % self.bytes.len();
                        self.bytes.truncate(size);
                    }
                }
            }
        }
    }

    fn region(&self, script: &mut Script<'_>) -> Region {
        let list = if script.u8().is_multiple_of(4) || self.bodies.is_empty() {
            &self.heads
        } else {
            &self.bodies
        };
        list[script.below(list.len())]
    }

    fn position(&self, script: &mut Script<'_>) -> usize {
        let region = self.region(script);
        (region.offset + script.below(region.size)).min(self.bytes.len() - 1)
    }

    fn set_field(&mut self, script: &mut Script<'_>) {
        let width = 1usize << (script.u8() % 4);
        let at = self.position(script) & !(width - 1);
        let end = (at + width).min(self.bytes.len());
        let old = self.word(at, end);
        let value = self.value(script, old);
        let bytes = value.to_le_bytes();
        self.bytes[at..end].copy_from_slice(&bytes[..end - at]);
    }

    fn word(&self, start: usize, end: usize) -> u64 {
        let mut word = [0; 8];
        word[..end - start].copy_from_slice(&self.bytes[start..end]);
        u64::from_le_bytes(word)
    }

    fn value(&self, script: &mut Script<'_>, old: u64) -> u64 {
        match script.u8() % 8 {
            0 => script.u64(),
            1 => old.wrapping_add_signed(i64::from(script.u8() as i8)),
            2 => old ^ 1 << (script.u8() % 64),
            // What another field has.
            3 | 4 => {
                let at = self.position(script) & !7;
                self.word(at, (at + 8).min(self.bytes.len()))
            }
            // A place: of something, or of the end, in the units that offsets have.
            5 => {
                let unit = [0, 0, 2, 3, 5, 9, 12][script.below(7)];
                let place = if script.flag() {
                    self.bytes.len()
                } else {
                    self.position(script)
                };
                (place as u64 >> unit).wrapping_add_signed(i64::from(script.u8() as i8 / 16))
            }
            6 => 1u64
                .wrapping_shl(script.u8().into())
                .wrapping_add_signed(i64::from(script.u8() as i8 / 32)),
            _ => script.u8().into(),
        }
    }
}
