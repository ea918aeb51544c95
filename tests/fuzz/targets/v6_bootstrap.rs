//! RAFS v6 bootstraps.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rafsd_fuzz::v6_bootstrap::run(data));
