//! How a request lies in guest memory.

use std::sync::Arc;

use super::pages;
use crate::Result;
use crate::abi::OUT_HEADER;
use crate::memory::GuestMemory;
use crate::ops::Request;
use crate::random::Random;
use crate::vring::Segment;

/// How requests are cut into descriptors. The device must not care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One descriptor for the request, one for the reply.
    Compact,
    /// As Linux does: a descriptor for each header and each argument, data page by page.
    Linux,
    /// Cut at random places with gaps between, by this seed.
    Ragged(u64),
    /// Across the border of two regions that touch at this address.
    Crossing(u64),
    /// Pieces of so many bytes, one beside the other and a byte between: as many descriptors as it takes.
    Crumbs(usize),
}

/// A request in memory. Gives the memory back when dropped.
pub struct Laid {
    memory: Arc<GuestMemory>,
    taken: Vec<(u64, usize)>,
    pub readable: Vec<Segment>,
    pub writable: Vec<Segment>,
}

impl Drop for Laid {
    fn drop(&mut self) {
        for (address, len) in &self.taken {
            self.memory.release(*address, *len);
        }
    }
}

impl Laid {
    /// Whether there is room for a reply.
    pub fn answered(&self) -> bool {
        !self.writable.is_empty()
    }

    /// `len` bytes of the writable part from `offset`, across segments.
    pub fn gather(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let (mut skip, mut done) = (offset, 0);
        for segment in &self.writable {
            let size = segment.len as usize;
            if skip >= size {
                skip -= size;
                continue;
            }
            let here = (size - skip).min(len - done);
            self.memory
                .read(segment.address + skip as u64, &mut bytes[done..done + here]);
            done += here;
            skip = 0;
        }
        bytes
    }

    fn scatter(&self, bytes: &[u8]) {
        let mut done = 0;
        for segment in &self.readable {
            let here = segment.len as usize;
            self.memory.write(segment.address, &bytes[done..done + here]);
            done += here;
        }
    }

    fn take(&mut self, len: usize, align: u64) -> Result<u64> {
        let address = self.memory.allocate(len, align)?;
        self.taken.push((address, len));
        Ok(address)
    }
}

impl Layout {
    /// Puts a request into memory. `number` varies the random layouts, `limit` bounds the descriptors.
    pub(super) fn lay(
        self,
        memory: &Arc<GuestMemory>,
        header: &[u8],
        request: &Request,
        number: u64,
        limit: u16,
    ) -> Result<Laid> {
        let mut laid = Laid {
            memory: memory.clone(),
            taken: Vec::new(),
            readable: Vec::new(),
            writable: Vec::new(),
        };
        let mut bytes = header.to_vec();
        bytes.extend(request.args.iter().flatten());
        let room = request.room.map(|room| room + OUT_HEADER);
        match self {
            Layout::Linux => laid.linux(header, request)?,
            Layout::Compact => laid.compact(bytes.len(), room)?,
            Layout::Ragged(seed) => {
                let mut random = Random::new(seed ^ (number << 20));
                let most = usize::from(limit / 2).clamp(1, 40);
                laid.readable = laid.ragged(bytes.len(), most, &mut random)?;
                if let Some(room) = room {
                    laid.writable = laid.ragged(room, most, &mut random)?;
                }
            }
            Layout::Crumbs(size) => {
                laid.readable = laid.crumbs(bytes.len(), size)?;
                if let Some(room) = room {
                    laid.writable = laid.crumbs(room, size)?;
                }
            }
            Layout::Crossing(border) => {
                if laid.crossing(border, bytes.len(), room, number).is_err() {
                    laid.compact(bytes.len(), room)?;
                }
            }
        }
        laid.scatter(&bytes);
        Ok(laid)
    }
}

impl Laid {
    fn compact(&mut self, len: usize, room: Option<usize>) -> Result<()> {
        let address = self.take(len, 16)?;
        self.readable.push(Segment {
            address,
            len: len as u32,
        });
        if let Some(room) = room {
            let address = self.take(room, 16)?;
            self.writable.push(Segment {
                address,
                len: room as u32,
            });
        }
        Ok(())
    }

    fn linux(&mut self, header: &[u8], request: &Request) -> Result<()> {
        let address = self.take(header.len(), 16)?;
        self.readable.push(Segment {
            address,
            len: header.len() as u32,
        });
        for arg in request.args.iter().filter(|arg| !arg.is_empty()) {
            if arg.len() > 4096 {
                let address = self.take(arg.len(), 4096)?;
                self.readable.extend(pages(address, arg.len()));
            } else {
                let address = self.take(arg.len(), 16)?;
                self.readable.push(Segment {
                    address,
                    len: arg.len() as u32,
                });
            }
        }
        if let Some(room) = request.room {
            let address = self.take(OUT_HEADER, 16)?;
            self.writable.push(Segment {
                address,
                len: OUT_HEADER as u32,
            });
            if room > 4096 {
                let address = self.take(room, 4096)?;
                self.writable.extend(pages(address, room));
            } else if room > 0 {
                let address = self.take(room, 16)?;
                self.writable.push(Segment {
                    address,
                    len: room as u32,
                });
            }
        }
        Ok(())
    }

    fn ragged(&mut self, len: usize, most: usize, random: &mut Random) -> Result<Vec<Segment>> {
        let mut cuts: Vec<usize> = (1..random.below(most) + 1).map(|_| random.below(len)).collect();
        cuts.extend([0, len]);
        cuts.sort_unstable();
        cuts.dedup();
        let sizes: Vec<usize> = cuts.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let gaps: Vec<usize> = sizes.iter().map(|_| random.below(33)).collect();
        let mut address = self.take(len + gaps.iter().sum::<usize>(), 16)?;
        let mut segments = Vec::new();
        for (size, gap) in sizes.iter().zip(gaps) {
            address += gap as u64;
            segments.push(Segment {
                address,
                len: *size as u32,
            });
            address += *size as u64;
        }
        Ok(segments)
    }

    fn crumbs(&mut self, len: usize, size: usize) -> Result<Vec<Segment>> {
        let address = self.take(len.div_ceil(size) * (size + 1), 16)?;
        let crumb = |(number, from): (usize, usize)| Segment {
            address: address + (number * (size + 1)) as u64,
            len: size.min(len - from) as u32,
        };
        Ok((0..len).step_by(size).enumerate().map(crumb).collect())
    }

    /// Request and reply in one piece; the border falls into the one or into the other.
    fn crossing(&mut self, border: u64, len: usize, room: Option<usize>, number: u64) -> Result<()> {
        let room = room.unwrap_or(0);
        let before = if number.is_multiple_of(4) || room == 0 {
            len / 2
        } else {
            len + room / 3
        };
        let (low, high) = (
            before.next_multiple_of(16),
            (len + room - before).next_multiple_of(16),
        );
        self.memory.allocate_across(border, low as u64, high as u64)?;
        self.taken.extend([(border - low as u64, low), (border, high)]);
        let address = border - before as u64;
        self.readable.push(Segment {
            address,
            len: len as u32,
        });
        if room > 0 {
            self.writable.push(Segment {
                address: address + len as u64,
                len: room as u32,
            });
        }
        Ok(())
    }
}
