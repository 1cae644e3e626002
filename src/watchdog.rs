//! Sees what hangs: a panic is seen by whoever waits for it, but a part that blocks its thread, or waits for ever, says nothing.
//!
//! Every part counts up while it lives, and one thread that nothing else runs on looks each second who has not. It counts its own looks and no time, so
//! that a process that was stopped and goes on finds nobody guilty. A part without which nothing goes on ends the process, which every file survives,
//! and whoever started it starts it again; the others are told of, in the log and by `/health`.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sd_notify::NotifyState;

use crate::fail_point;

/// How often parts count, and are looked at.
const TICK: Duration = Duration::from_secs(1);
/// Looks without a sign of life before it is told.
const TOLD_AFTER: u32 = 5;
/// Looks before a part hangs: within 30 s.
const HUNG_AFTER: u32 = 28;
/// What a process ends with that cannot go on.
pub const EXIT_CODE: i32 = 70;

/// Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Watchdog {
    parts: Arc<Mutex<Vec<Part>>>,
}

/// A part's sign of life. Dropped with the part, which is looked at no more.
#[derive(Debug)]
pub struct Beat(Arc<AtomicU64>);

/// Whether anything is under way in a part that often has nothing to do.
#[derive(Debug)]
pub struct Work(Beat);

#[derive(Debug)]
struct Part {
    name: String,
    /// The part has the other one.
    beats: Arc<AtomicU64>,
    /// Nothing goes on without it.
    vital: bool,
    /// Odd counts are work, and even ones rest.
    rests: bool,
    last: u64,
    silent: u32,
}

/// What a look found.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Silent(String),
    Back(String),
    Hangs { name: String, vital: bool },
}

impl Watchdog {
    /// Starts the thread.
    ///
    /// # Errors
    /// When none can be started.
    pub fn start() -> io::Result<Self> {
        let watchdog = Self::default();
        let parts = Arc::downgrade(&watchdog.parts);
        std::thread::Builder::new().name("watchdog".to_owned()).spawn(move || {
            let service_manager_asks = sd_notify::watchdog_enabled().is_some();
            loop {
                std::thread::sleep(tick());
                let Some(parts) = parts.upgrade() else { return };
                Self { parts }.look_and_act();
                if service_manager_asks {
                    tell_service_manager(NotifyState::Watchdog);
                }
            }
        })?;
        Ok(watchdog)
    }

    /// The thread that this is called on, by a task that counts on it.
    pub fn watch_this_thread(&self) {
        let thread = std::thread::current();
        let beat = self.part(format!("the thread {:?}", thread.name().unwrap_or("without a name")), true, false);
        actix_rt::spawn(async move {
            loop {
                beat.beat();
                tokio::time::sleep(tick()).await;
            }
        });
    }

    /// A part that answers, without which nothing goes on.
    pub fn watch_answers<F: Future<Output = bool>>(&self, name: &str, ask: impl Fn() -> F + 'static) {
        let beat = self.part(name.to_owned(), true, false);
        actix_rt::spawn(async move {
            while ask().await {
                beat.beat();
                tokio::time::sleep(tick()).await;
            }
        });
    }

    /// A part that recordings go on without: it says when it begins and ends something.
    pub fn work(&self, name: String) -> Work {
        Work(self.part(name, false, true))
    }

    /// What has not given a sign of life for some seconds, and whether nothing goes on without it. Hundreds of the same name may wait for the same: they
    /// are one, by the longest of them.
    pub fn silent(&self) -> Vec<(String, bool)> {
        let parts = self.lock();
        let mut silent = BTreeMap::<(&str, bool), u32>::new();
        for part in parts.iter().filter(|part| part.silent >= TOLD_AFTER && Arc::strong_count(&part.beats) > 1) {
            let longest = silent.entry((&part.name, part.vital)).or_default();
            *longest = part.silent.max(*longest);
        }
        silent.into_iter().map(|((name, vital), seconds)| (format!("{name} has not answered for {seconds} s"), vital)).collect()
    }

    fn part(&self, name: String, vital: bool, rests: bool) -> Beat {
        let beats = Arc::<AtomicU64>::default();
        self.lock().push(Part { name, beats: Arc::clone(&beats), vital, rests, last: 0, silent: 0 });
        Beat(beats)
    }

    fn look_and_act(&self) {
        for found in self.look() {
            match found {
                Found::Silent(name) => log::warn!("{name} has not answered for {TOLD_AFTER} s"),
                Found::Back(name) => log::warn!("{name} answers again"),
                Found::Hangs { name, vital: false } => log::error!("{name} hangs, recordings go on without it"),
                Found::Hangs { name, vital: true } => {
                    log::error!("{name} hangs, the server ends");
                    std::process::exit(EXIT_CODE);
                }
            }
        }
    }

    fn look(&self) -> Vec<Found> {
        let mut found = Vec::new();
        self.lock().retain_mut(|part| {
            let has_ended = Arc::get_mut(&mut part.beats).is_some();
            found.extend(part.look(has_ended));
            !has_ended
        });
        found
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Part>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Part {
    fn look(&mut self, has_ended: bool) -> Option<Found> {
        let beats = self.beats.load(Relaxed);
        let rests = self.rests && beats.is_multiple_of(2);
        // Who has ended at rest has done its work; who has ended amid it, or never rests, is asked no more.
        if rests || (!has_ended && std::mem::replace(&mut self.last, beats) != beats) {
            let was_silent = std::mem::take(&mut self.silent) >= if self.vital { TOLD_AFTER } else { HUNG_AFTER };
            return was_silent.then(|| Found::Back(self.name.clone()));
        }
        if has_ended {
            return None;
        }
        self.silent = self.silent.saturating_add(1);
        match self.silent {
            // Of hundreds that wait for the same, one line for each is too much so early.
            TOLD_AFTER if self.vital => Some(Found::Silent(self.name.clone())),
            HUNG_AFTER => Some(Found::Hangs { name: self.name.clone(), vital: self.vital }),
            _ => None,
        }
    }
}

impl Beat {
    pub fn beat(&self) {
        self.0.fetch_add(1, Relaxed);
    }
}

impl Work {
    /// Something begins.
    pub fn begin(&self) {
        self.0.0.fetch_or(1, Relaxed);
    }

    /// It has ended.
    pub fn end(&self) {
        self.0.beat();
    }
}

/// Says something to systemd, if that has started the server and wants to know.
pub fn tell_service_manager(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        log::warn!("the service manager cannot be told error={error}");
    }
}

fn tick() -> Duration {
    fail_point::deadline("watchdog-tick", TICK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i9_what_gives_no_sign_of_life_is_told_and_then_hangs() {
        let watchdog = Watchdog::default();
        let (lives, hangs) = (watchdog.part("one".to_owned(), true, false), watchdog.part("two".to_owned(), true, false));
        hangs.beat();
        for look in 0..=HUNG_AFTER {
            lives.beat();
            let expected = match look {
                TOLD_AFTER => vec![Found::Silent("two".to_owned())],
                HUNG_AFTER => vec![Found::Hangs { name: "two".to_owned(), vital: true }],
                _ => vec![],
            };
            assert_eq!(watchdog.look(), expected, "look {look}");
        }
        assert_eq!(watchdog.silent(), [("two has not answered for 28 s".to_owned(), true)]);
        hangs.beat();
        assert_eq!(watchdog.look(), [Found::Back("two".to_owned())]);
        drop(hangs);
        assert!(
            (0..40).all(|_| {
                lives.beat();
                watchdog.look().is_empty()
            }),
            "who has ended does not hang"
        );
    }

    #[test]
    fn who_rests_does_not_hang_and_who_works_for_too_long_does() {
        let watchdog = Watchdog::default();
        let work = watchdog.work("rows".to_owned());
        assert!((0..40).all(|_| watchdog.look().is_empty()));
        for _ in 0..40 {
            work.begin();
            assert_eq!(watchdog.look(), []);
            work.end();
        }
        work.begin();
        let found: Vec<Found> = (0..40).flat_map(|_| watchdog.look()).collect();
        assert_eq!(found, [Found::Hangs { name: "rows".to_owned(), vital: false }]);
        work.end();
        assert_eq!(watchdog.look(), [Found::Back("rows".to_owned())]);
    }

    #[test]
    fn work_that_hung_is_told_to_be_done_though_who_did_it_has_ended_and_many_of_a_kind_are_one_to_whoever_asks() {
        let watchdog = Watchdog::default();
        let [done, given_up] = [(); 2].map(|()| watchdog.work("a seal".to_owned()));
        done.begin();
        given_up.begin();
        assert_eq!((0..HUNG_AFTER).flat_map(|_| watchdog.look()).collect::<Vec<_>>(), [], "the first look sees it begin");
        let hangs = || Found::Hangs { name: "a seal".to_owned(), vital: false };
        assert_eq!(watchdog.look(), [hangs(), hangs()]);
        assert_eq!(watchdog.silent(), [("a seal has not answered for 28 s".to_owned(), false)]);
        done.end();
        drop((done, given_up));
        assert_eq!(watchdog.silent(), []);
        assert_eq!(watchdog.look(), [Found::Back("a seal".to_owned())]);
        assert!(watchdog.lock().is_empty());
    }
}
