//! What a `kill -9` costs: tracks that stream, and a server that is gone from one moment to the next.

use std::path::Path;
use std::time::Duration;

use crate::load::{self, Pause};
use crate::{recordings, sleep_until, spawn_server};

const TRACKS: u16 = 20;
/// Between two appends, whichever they are.
const KILLED_AFTER: Duration = Duration::from_millis(4_321);
pub const FRAMES_PER_MS: u64 = 48;

/// The audio that each track lost, the least first.
pub fn losses(directory: &Path) -> anyhow::Result<Vec<Duration>> {
    let mut server = spawn_server(directory)?;
    eprintln!("kill -9: streaming {TRACKS} tracks");
    let connections = load::connect(server.address(), TRACKS)?;
    let streaming = load::start(connections, load::chunks_in(2 * KILLED_AFTER), Pause::default())?;
    sleep_until(streaming.started_at() + KILLED_AFTER);
    server.child.kill()?;
    server.child.wait()?;
    let sent = streaming.cut_off()?;
    let mut losses = Vec::with_capacity(sent.len());
    for (track, sent) in sent {
        let kept = recordings::kept(directory, track)?.in_place;
        losses.push(Duration::from_millis(u64::from(sent).saturating_sub(kept) / FRAMES_PER_MS));
    }
    losses.sort();
    Ok(losses)
}
