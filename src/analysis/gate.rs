//! One credential, many connections: when the service refuses the key, it is said once, and one connection of the process tries again now and then.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// Whether a connection may be tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permit {
    Go,
    /// The key was refused; ask again after this.
    Wait(Duration),
}

/// Shared by all tracks.
#[derive(Debug)]
pub struct CredentialGate {
    retry: Duration,
    /// When the key was refused, the time of the next try.
    next_try: Mutex<Option<Instant>>,
    accepted: Notify,
}

impl CredentialGate {
    pub fn new(retry: Duration) -> Self {
        Self { retry, next_try: Mutex::default(), accepted: Notify::new() }
    }

    /// Asks before a try. While the key is refused, one asker in each period gets to go.
    pub fn permit(&self, now: Instant) -> Permit {
        let mut next_try = self.lock();
        match *next_try {
            None => Permit::Go,
            Some(next) if next <= now => {
                *next_try = Some(now + self.retry);
                Permit::Go
            }
            Some(next) => Permit::Wait(next - now),
        }
    }

    /// The key was refused. Says whether that is news.
    pub fn refused(&self, now: Instant) -> bool {
        self.lock().replace(now + self.retry).is_none()
    }

    /// The key was accepted: everybody may go. Says whether that is news.
    pub fn accepted(&self) -> bool {
        let is_news = self.lock().take().is_some();
        if is_news {
            self.accepted.notify_waiters();
        }
        is_news
    }

    /// Resolves at the first acceptance after this call. Made before [`CredentialGate::permit`] is asked, it misses none.
    pub fn acceptance(&self) -> Notified<'_> {
        self.accepted.notified()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.next_try.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn a_refused_key_is_news_once_and_tried_by_one_in_each_period() {
        let gate = CredentialGate::new(Duration::from_secs(300));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(gate.permit(at(0)), Permit::Go);
        assert!(gate.refused(at(0)));
        assert!(!gate.refused(at(1)), "another connection that was under way");
        assert_eq!(gate.permit(at(2)), Permit::Wait(Duration::from_secs(299)));
        assert_eq!(gate.permit(at(301)), Permit::Go);
        assert_eq!(gate.permit(at(302)), Permit::Wait(Duration::from_secs(299)), "one is trying already");
        assert!(gate.accepted());
        assert!(!gate.accepted());
        assert_eq!(gate.permit(at(303)), Permit::Go);
    }

    #[test]
    fn who_waits_goes_as_soon_as_the_key_is_accepted() {
        let gate = CredentialGate::new(Duration::from_secs(300));
        let now = Instant::now();
        gate.refused(now);
        let acceptance = gate.acceptance();
        assert_eq!(gate.permit(now), Permit::Wait(Duration::from_secs(300)));
        assert!(gate.accepted());
        assert_eq!(acceptance.now_or_never(), Some(()));
        assert_eq!(gate.acceptance().now_or_never(), None, "that is over");
    }
}
