#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| live_meeting::fuzzing::ingest_query(data));
