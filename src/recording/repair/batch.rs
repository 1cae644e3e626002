//! Many files at once. Threads wait for the disk more than they work, and a journal takes the syncs of several in one go.

use std::io;
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::{Interrupted, Mode, Outcome, booted_at, repair_since};
use crate::fail_point;

/// More were no quicker, one took ten times as long (ext4, 1,000 files).
const THREADS: usize = 16;

/// Repairs files, and tells what became of each, in their order. `done` is called after each.
pub fn repair_all(files: &[Interrupted], mode: Mode, done: impl Fn() + Sync) -> Vec<io::Result<Outcome>> {
    repair_by(THREADS, files, mode, done)
}

/// The same one after the other, beside other work.
pub fn repair_each(files: &[Interrupted]) -> Vec<io::Result<Outcome>> {
    repair_by(1, files, Mode::Repair, || {})
}

fn repair_by(threads: usize, files: &[Interrupted], mode: Mode, done: impl Fn() + Sync) -> Vec<io::Result<Outcome>> {
    let booted_at = booted_at();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut outcomes = Vec::new();
        while let Some((number, file)) = take(files, &next) {
            // A start that died of one file would die of it again and again.
            let outcome = catch_unwind(|| {
                fail_point::pass("repair-file");
                repair_since(file, mode, booted_at)
            });
            outcomes.push((number, outcome.unwrap_or_else(|_| Err(io::Error::other("its repair panicked")))));
            done();
        }
        outcomes
    };
    let mut outcomes = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads.min(files.len())).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("panics are caught")).collect::<Vec<_>>()
    });
    outcomes.sort_unstable_by_key(|(number, _)| *number);
    outcomes.into_iter().map(|(_, outcome)| outcome).collect()
}

fn take<'a>(files: &'a [Interrupted], next: &AtomicUsize) -> Option<(usize, &'a Interrupted)> {
    let number = next.fetch_add(1, Relaxed);
    files.get(number).map(|file| (number, file))
}
