#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| live_meeting::fuzzing::path_components(data));
