//! The SHA-256 of a file, whatever its size, with little memory.

use std::fs::File;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::fs::{Advice, fadvise};
use sha2::{Digest, Sha256};

/// What is read at once.
const PIECE_BYTES: usize = 256 * 1024;
/// After so much the page cache is told that it need not keep what was read: recordings would push out everything else.
const FORGET_BYTES: u64 = 16 * 1024 * 1024;

/// A digest, in hexadecimal as `sha256sum` prints it, and the bytes it is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hashed {
    pub sha256: String,
    pub bytes: u64,
}

/// Reads the file once. `None` when `stop` was set meanwhile.
///
/// # Errors
/// What the file system says.
pub fn sha256_of(mut file: File, stop: &AtomicBool) -> io::Result<Option<Hashed>> {
    let mut digest = Sha256::new();
    let mut piece = vec![0; PIECE_BYTES];
    let (mut bytes, mut kept) = (0, 0);
    loop {
        if stop.load(Relaxed) {
            return Ok(None);
        }
        let read = file.read(&mut piece)?;
        if read == 0 {
            break;
        }
        digest.update(piece.get(..read).unwrap_or_default());
        bytes += u64::try_from(read).unwrap_or(u64::MAX);
        if bytes - kept >= FORGET_BYTES {
            forget(&file);
            kept = bytes;
        }
    }
    forget(&file);
    Ok(Some(Hashed { sha256: digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect(), bytes }))
}

fn forget(file: &File) {
    if let Err(error) = fadvise(file, 0, None, Advice::DontNeed) {
        log::debug!("the page cache keeps a file error={error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_the_standard_and_a_stop_ends_the_reading() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("x");
        let go = AtomicBool::new(false);
        let open = || File::open(&path).expect("a file");
        for (content, sha256) in [
            (Vec::new(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
            (b"abc".to_vec(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            // FIPS 180-2, appendix B.3, which several pieces make.
            (vec![b'a'; 1_000_000], "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
        ] {
            std::fs::write(&path, &content).expect("written");
            let hashed = Hashed { sha256: sha256.to_owned(), bytes: content.len() as u64 };
            assert_eq!(sha256_of(open(), &go).expect("read"), Some(hashed));
        }
        assert_eq!(sha256_of(open(), &AtomicBool::new(true)).expect("no fault"), None);
    }
}
