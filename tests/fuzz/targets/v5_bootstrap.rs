//! RAFS v5 bootstraps.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rafsd_fuzz::v5_bootstrap::run(data));
