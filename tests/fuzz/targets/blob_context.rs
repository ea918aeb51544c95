//! Chunk information and chunk data of blobs.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rafsd_fuzz::blob_context::run(data));
