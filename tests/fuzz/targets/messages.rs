//! FUSE messages, given to the device over file systems without files.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rafsd_fuzz::messages::run(data));
