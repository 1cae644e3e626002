//! One credential, many connections: when the service refuses the key, it is said once, and one connection of the process tries again now and then.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

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
}

impl CredentialGate {
    pub fn new(retry: Duration) -> Self {
        Self { retry, next_try: Mutex::default() }
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
        self.lock().take().is_some()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.next_try.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
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
}
