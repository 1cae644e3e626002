//! The mark that a socket's bytes must reach before the kernel says that there is something to read.
//!
//! LiveKit sends a message each 10 ms. Where the mark is higher than a batch, nobody is woken for what comes, and the socket is read when there is a batch
//! (`docs/performance.md`). But then a lone Close waits below the mark: it must fall as soon as the stream pauses.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use bytes::{Bytes, BytesMut};
use nix::libc;
use nix::sys::socket::{MsgFlags, SetSockOpt, recv};

/// What is read with one call: more than a batch of LiveKit's.
const CALL_BYTES: usize = 64 * 1024;
/// The most that one look at a socket reads.
const MOST_BYTES: usize = 4 * CALL_BYTES;

thread_local! {
    /// Where sockets of this thread are read to: one place for all, which none keeps between two reads.
    static READ_TO: RefCell<Vec<u8>> = RefCell::new(vec![0; CALL_BYTES]);
}

#[derive(Debug, Clone, Copy)]
struct ReceiveLowWater;

nix::setsockopt_impl!(ReceiveLowWater, libc::SOL_SOCKET, libc::SO_RCVLOWAT, usize, nix::sys::socket::sockopt::SetUsize);

/// Another handle of an accepted socket, made before it is known what will be asked on it.
pub struct SocketHandle(Cell<Option<OwnedFd>>);

impl SocketHandle {
    /// `None` where descriptors may become scarce, out of `descriptors` that are allowed: then the socket is read message by message, which costs only time.
    pub fn of(socket: impl AsFd, descriptors: Option<u64>) -> Option<Self> {
        // The lowest free number is given out, so a number tells how many are in use.
        let in_use = u64::try_from(socket.as_fd().as_raw_fd()).unwrap_or(u64::MAX);
        let plenty = descriptors.is_none_or(|allowed| in_use < allowed / 4);
        let handle = if plenty { socket.as_fd().try_clone_to_owned().ok() } else { None };
        handle.map(|handle| Self(Cell::new(Some(handle))))
    }

    /// The handle, once. It keeps the connection open for as long as it lives.
    pub fn take(&self) -> Option<OwnedFd> {
        self.0.take()
    }
}

/// A socket's low-water mark, which is 1 until it is raised.
#[derive(Debug)]
pub struct LowWater {
    socket: OwnedFd,
    raised_to: usize,
    is_raised: Cell<bool>,
}

impl LowWater {
    /// `bytes` is the mark while it is raised.
    pub fn new(socket: OwnedFd, bytes: usize) -> Self {
        Self { socket, raised_to: bytes, is_raised: Cell::new(false) }
    }

    pub fn is_raised(&self) -> bool {
        self.is_raised.get()
    }

    pub fn raise(&self) {
        if !self.is_raised.replace(true) {
            self.set(self.raised_to);
        }
    }

    /// The kernel says at once that what waits below the mark can be read.
    pub fn lower(&self) {
        if self.is_raised.replace(false) {
            self.set(1);
        }
    }

    /// Reads what is there without waiting, up to 256 KiB. Empty when the sender has ended.
    ///
    /// # Errors
    /// What the kernel says; `WouldBlock` when there is nothing.
    pub fn read(&self) -> io::Result<Bytes> {
        READ_TO.with_borrow_mut(|buffer| {
            let mut bytes = BytesMut::new();
            loop {
                let length = match recv(self.socket.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
                    Ok(length) => length,
                    // What it says will be said again.
                    Err(_) if !bytes.is_empty() => 0,
                    Err(error) => return Err(error.into()),
                };
                bytes.extend_from_slice(buffer.get(..length).unwrap_or_default());
                if length < buffer.len() || bytes.len() >= MOST_BYTES {
                    return Ok(bytes.freeze());
                }
            }
        })
    }

    fn set(&self, bytes: usize) {
        // A socket that takes no mark, or is gone, is read as it always was.
        if let Err(error) = ReceiveLowWater.set(&self.socket, &bytes) {
            log::debug!("a socket's low-water mark stays as it is bytes={bytes} error={error}");
        }
    }
}
