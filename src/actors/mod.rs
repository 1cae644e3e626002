//! Everything with a mailbox.
//!
//! ```text
//! SessionRegistry            webhooks in, store writes out; knows every live track
//! Reconciler                 compares what LiveKit lists with what is known
//! EgressStarter              one track egress for every track that is to be recorded
//! TrackActor (one a socket)  supervises
//!   BufferActor              its death fails the track: it holds the only copy
//!   WavWriterActor           its death or an I/O error opens the next segment: 5 in 60 s, then the track fails
//!   VideoWriterActor         of a track of video, instead of the two above: as the WavWriterActor; TrackActor itself holds what waits
//!   HumeClientActor          its death restarts it with backoff; the recording never notices
//! ```
//!
//! | mailbox | capacity | derivation |
//! | --- | --- | --- |
//! | SessionRegistry | 1,024 | LiveKit keeps at most 200 events a room; a burst of 500 tracks opens at once |
//! | Reconciler | 16 | wishes to compare, which are one wish |
//! | EgressStarter | 1,024 | 200 tracks published at once, each with a word about its row and its socket |
//! | TrackActor | 64 | one batch per 150 ms: 9 s of audio |
//! | BufferActor | 64 | fed by TrackActor alone, one message for each of its own |
//! | WavWriterActor | 16 | one append in flight, and FinishSegment |
//! | VideoWriterActor | 16 | the same |
//! | HumeClientActor | 64 | one group per 0.1 s at least; its own queue is bounded in time of audio |

pub mod buffer;
pub mod child;
pub mod egress_starter;
pub mod hume_client;
pub mod in_flight;
pub mod mutes;
pub mod read_stalls;
pub mod reconciler;
pub mod session_registry;
pub mod stats;
pub mod totals;
pub mod track;
pub mod video_stats;
pub mod video_writer;
pub mod wav_writer;
