//! Keys that the server makes for itself where the operator has set none.

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::config::Secret;

/// A key and whether it was made just now.
#[derive(Debug)]
pub struct KeptKey {
    pub key: Secret,
    pub path: PathBuf,
    pub is_new: bool,
}

/// Reads the key that is kept in `dir` under `name`, or makes one of 256 random bits, readable by its owner alone.
///
/// # Errors
/// When the file can neither be read nor made, or is empty.
pub fn load_or_make(dir: &Path, name: &str) -> io::Result<KeptKey> {
    let path = dir.join(name);
    if let Some(key) = load(&path)? {
        return Ok(KeptKey { key, path, is_new: false });
    }
    std::fs::create_dir_all(dir)?;
    let mut random = [0; 32];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    let key: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    // Written beside and linked, so that two servers that start at once agree, and neither reads half a key.
    let fresh = dir.join(format!(".{name}.{}", uuid::Uuid::new_v4().simple()));
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh)?;
    writeln!(file, "{key}")?;
    file.sync_all()?;
    let linked = std::fs::hard_link(&fresh, &path);
    std::fs::remove_file(&fresh)?;
    match linked {
        Ok(()) => Ok(KeptKey { key: Secret::new(key), path, is_new: true }),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let key = load(&path)?.ok_or(io::ErrorKind::NotFound)?;
            Ok(KeptKey { key, path, is_new: false })
        }
        Err(error) => Err(error),
    }
}

/// The key at `path`, if there is one.
///
/// # Errors
/// When it cannot be read, or is empty.
pub fn load(path: &Path) -> io::Result<Option<Secret>> {
    match std::fs::read_to_string(path) {
        Ok(text) if text.trim().is_empty() => Err(io::Error::new(io::ErrorKind::InvalidData, format!("{} is empty", path.display()))),
        Ok(text) => Ok(Some(Secret::new(text.trim()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once_for_its_owner_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let made = load_or_make(dir.path(), "admin-key").expect("made");
        let read = load_or_make(dir.path(), "admin-key").expect("read");
        assert!(made.is_new && !read.is_new);
        assert_eq!(made.key.expose(), read.key.expose());
        assert_eq!(made.key.expose().len(), 64);
        let mode = std::fs::metadata(&made.path).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).expect("a directory").count(), 1, "nothing else is left");
    }

    #[test]
    fn an_empty_key_file_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("admin-key"), "\n").expect("written");
        load_or_make(dir.path(), "admin-key").expect_err("refused");
    }
}
