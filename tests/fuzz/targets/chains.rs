//! Descriptor chains, given to the device.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rafsd_fuzz::chains::run(data));
