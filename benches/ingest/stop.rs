//! What it costs that all tracks pause at once, which is filled in all files at once; and a SIGTERM amid the load.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::kill::FRAMES_PER_MS;
use crate::load::{self, Pause};
use crate::scrape::Classes;
use crate::{WRITE_LAG, recordings, sleep_until, spawn_server};

const PAUSES_AFTER: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_secs(1);
/// A pause counts when audio has flowed at its own pace for a second.
const IS_FILLED: Duration = Duration::from_secs(3);
/// Longer than a stop may take.
const SPEAKS_ON: Duration = Duration::from_secs(15);

pub struct Stopped {
    /// While the pauses were filled, as the figure beside it.
    pub lag_p99_ms: Option<u64>,
    pub filled: usize,
    /// From the signal to the end of the process.
    pub took: Duration,
    pub complaint: Option<String>,
    pub sealed: usize,
    /// What was due before the signal and is in no file, the most of all tracks.
    pub missing: Duration,
}

/// # Errors
/// When the server cannot be started or talked to, or what it left cannot be read.
pub fn measure(directory: &Path, tracks: u16) -> anyhow::Result<Stopped> {
    let mut server = spawn_server(directory)?;
    eprintln!("SIGTERM: streaming {tracks} tracks, with a pause");
    let connections = load::connect(server.address(), tracks)?;
    let pause = Pause { after_chunks: load::chunks_in(PAUSES_AFTER), lasts: PAUSE };
    let streaming = load::start(connections, load::chunks_in(PAUSES_AFTER + IS_FILLED + SPEAKS_ON), pause)?;
    let started_at = streaming.started_at();
    sleep_until(started_at + PAUSES_AFTER + PAUSE);
    let lags = Classes::read(server.address(), WRITE_LAG)?;
    sleep_until(started_at + PAUSES_AFTER + PAUSE + IS_FILLED);
    let lag_p99_ms = Classes::read(server.address(), WRITE_LAG)?.p99_ms_since(&lags);
    let signalled_at = Instant::now();
    let complaint = server.stop()?;
    let took = signalled_at.elapsed();
    streaming.cut_off()?;
    let due = u64::try_from((signalled_at - started_at - PAUSE).as_millis())? * FRAMES_PER_MS;
    let (mut filled, mut missing) = (0, 0);
    for track in 0..tracks {
        let kept = recordings::kept(directory, track)?;
        filled += usize::from(kept.silent > 0);
        missing = missing.max(due.saturating_sub(kept.in_place));
    }
    Ok(Stopped {
        lag_p99_ms,
        filled,
        took,
        complaint,
        sealed: recordings::sealed(directory)?,
        missing: Duration::from_millis(missing / FRAMES_PER_MS),
    })
}
