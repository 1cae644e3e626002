//! Who may write a file: its writer holds an advisory lock on it, which ends with the process, whatever that dies of.

use std::fs::File;
use std::io;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// Takes the file for as long as it is open. `false` if another holds it. Where the file system knows no locks, nobody does.
///
/// # Errors
/// What else the file system says.
pub fn hold(file: &File) -> io::Result<bool> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) | Err(Errno::NOSYS | Errno::OPNOTSUPP | Errno::NOLCK | Errno::INVAL) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
