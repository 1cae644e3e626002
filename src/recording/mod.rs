//! Bytes to disk: names that no sender can abuse, and files that are valid at every instant: WAV, H.264 and IVF.

pub mod append_pool;
pub mod disk;
pub mod fence;
pub mod finish;
pub mod hash;
pub mod ivf;
pub mod joined;
pub mod lock;
pub mod moving;
pub mod notes;
pub mod path;
pub mod pipeline_log;
pub mod pulse;
pub mod repair;
pub mod root;
pub mod segment_file;
pub mod segment_reader;
pub mod sidecar;
pub mod syncer;
pub mod unnamed;
pub mod video_file;
pub mod video_stream;
pub mod wav_header;
