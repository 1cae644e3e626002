//! How much room there is for recordings, and whether they can be written at all.

use std::fmt;
use std::io;
use std::sync::{Mutex, PoisonError};

use bytesize::ByteSize;

use super::root::Root;
use crate::config::MinFree;

/// The file system that recordings go to, as it was when it was last looked at.
#[derive(Debug)]
pub struct Disk {
    root: Root,
    min_free: MinFree,
    space: Mutex<Option<Space>>,
}

/// The room on a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    pub total_bytes: u64,
    pub free_bytes: u64,
    /// Below this much new recordings are refused.
    pub min_free_bytes: u64,
}

impl Space {
    /// Whether new recordings are refused. Those that run go on to the last byte.
    pub fn is_low(self) -> bool {
        self.free_bytes < self.min_free_bytes
    }
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} are free, and storage.min_free asks for {}", ByteSize(self.free_bytes), ByteSize(self.min_free_bytes))
    }
}

/// What a look at the disk found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Look {
    /// What keeps recordings from being written; nothing if they can be. Little room is not among it: see [`Disk::space`].
    pub problem: Option<String>,
    /// They can be, but who looks for them under their name does not find them.
    pub moved: Option<String>,
}

impl Disk {
    /// Nothing is measured yet.
    pub fn new(root: Root, min_free: MinFree) -> Self {
        Self { root, min_free, space: Mutex::default() }
    }

    pub fn root(&self) -> &Root {
        &self.root
    }

    /// What the last measurement found; nothing before the first.
    pub fn space(&self) -> Option<Space> {
        *self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Measures the room, and says in the log where it begins or ceases to be low. Blocks.
    ///
    /// # Errors
    /// What the file system says; the last measurement stands then.
    pub fn measure(&self) -> io::Result<Space> {
        let (total_bytes, free_bytes) = self.root.space()?;
        let space = Space { total_bytes, free_bytes, min_free_bytes: self.min_free.bytes_of(total_bytes) };
        let before = self.space.lock().unwrap_or_else(PoisonError::into_inner).replace(space);
        match (before.is_some_and(Space::is_low), space.is_low()) {
            (false, true) => {
                log::error!(
                    "new recordings are refused for want of space, those that run go on free_bytes={free_bytes} min_free_bytes={}",
                    space.min_free_bytes
                );
            }
            (true, false) => {
                log::warn!("new recordings are taken again, there is space free_bytes={free_bytes} min_free_bytes={}", space.min_free_bytes);
            }
            (true, true) | (false, false) => {}
        }
        Ok(space)
    }

    /// Whether recordings can be written, found out by writing. Blocks.
    pub fn look(&self) -> Look {
        let problem = self.root.probe().err().map(|error| error.to_string());
        let moved = !self.root.is_in_place().unwrap_or(true);
        Look { problem, moved: moved.then(|| format!("{} was moved away, recordings go on in it", self.root.path().display())) }
    }
}
