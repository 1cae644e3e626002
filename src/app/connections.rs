//! How many connections there may be, and how the kernel watches them.

use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

/// A peer that acknowledges nothing for this long is gone (`docs/FACTS.md`, F2).
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(20);

/// How many connections each worker can hold and leave descriptors for files: of those that are no track yet, or never will be, there may be many more than
/// of tracks. Whoever comes then waits in the listening queue, where it costs a live track nothing.
pub(super) fn connections_with(descriptors: Option<u64>, workers: usize) -> usize {
    let Some(all) = descriptors.and_then(|all| usize::try_from(all).ok()) else { return usize::MAX };
    // An eighth is for files that are being sealed while their tracks go on; the rest of what is kept for database, threads and logs.
    let kept = all / 8 + 48 + 8 * workers;
    // A third of what is left is for files, directories and analysis.
    (all.saturating_sub(kept) * 2 / 3 / workers.max(1)).max(1)
}

/// A peer that vanishes without a word is found by the kernel: a WebSocket actor cannot, while nobody reads what it writes.
pub(super) fn set_timeouts(stream: &actix_web::rt::net::TcpStream) {
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new().with_time(TCP_USER_TIMEOUT).with_interval(TCP_USER_TIMEOUT / 4);
    let set = socket.set_tcp_keepalive(&keepalive).and_then(|()| socket.set_tcp_nodelay(true));
    #[cfg(target_os = "linux")]
    let set = set.and_then(|()| socket.set_tcp_user_timeout(Some(TCP_USER_TIMEOUT)));
    if let Err(error) = set {
        log::warn!("a connection has no time-outs error={error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i4_connections_leave_descriptors_for_files() {
        assert_eq!(connections_with(None, 2), usize::MAX);
        for (descriptors, workers, each) in [(160, 2, 25), (1_024, 2, 277), (20_000, 2, 5_812), (65_536, 8, 4_769), (64, 4, 1)] {
            assert_eq!(connections_with(Some(descriptors), workers), each, "{descriptors} for {workers} workers");
        }
    }
}
