//! Blobs with a bootstrap inside.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rafsd_fuzz::toc::run(data));
