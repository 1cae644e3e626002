//! Finds what a crash left below a directory. Links are not followed.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};

use super::Mode;
use crate::recording::lock;
use crate::recording::root::rename_without_replacing;
use crate::recording::sidecar::{no_follow, path_of};
use crate::recording::wav_header::{self, HEADER_BYTES};

/// What lies below a directory, sorted.
#[derive(Debug, Default)]
pub struct Found {
    /// WAV files without a sidecar.
    pub unsealed: Vec<PathBuf>,
    /// WAV files with one.
    pub sealed: Vec<PathBuf>,
    /// Files of segments in their first moment, which have no name yet.
    pub unfinished: Vec<PathBuf>,
    /// Directories that cannot be read, and why.
    pub unread: Vec<(PathBuf, io::Error)>,
}

/// Looks at every name below a directory.
pub fn look(directory: &Path) -> Found {
    let mut found = Found::default();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        if let Err(error) = list(&directory, &mut open, &mut found) {
            found.unread.push((directory, error));
        }
    }
    found.unsealed.sort_unstable();
    found.sealed.sort_unstable();
    found.unfinished.sort_unstable();
    found
}

fn list(directory: &Path, open: &mut Vec<PathBuf>, found: &mut Found) -> io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let (path, kind) = (entry.path(), entry.file_type()?);
        if kind.is_dir() {
            open.push(path);
        } else if kind.is_file() && path.extension() == Some(OsStr::new("wav")) {
            let of_kind = if path_of(&path).exists() { &mut found.sealed } else { &mut found.unsealed };
            of_kind.push(path);
        } else if kind.is_file() && is_unfinished(&path) {
            found.unfinished.push(path);
        }
    }
    Ok(())
}

/// `.<id>.new`, but not a sidecar's draft.
fn is_unfinished(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with('.') && name.ends_with(".new") && !name.ends_with(".json.new")
}

/// What became of a file without a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Adopted {
    /// It holds audio and has this name now: it can be repaired.
    Named(PathBuf),
    /// It holds nothing, or what no header speaks of, or is being written: left as it is.
    Left,
}

/// Gives a file of a segment in its first moment a name, if it holds audio.
///
/// # Errors
/// What the file system says.
pub fn adopt(path: &Path, mode: Mode) -> io::Result<Adopted> {
    let file = no_follow(OpenOptions::new().read(true)).open(path)?;
    if !lock::hold(&file)? {
        return Ok(Adopted::Left);
    }
    let metadata = file.metadata()?;
    if metadata.len() <= HEADER_BYTES {
        return Ok(Adopted::Left);
    }
    let mut header = [0; 44];
    file.read_exact_at(&mut header, 0)?;
    if wav_header::format_of(&header).is_none() {
        return Ok(Adopted::Left);
    }
    let time = DateTime::<Utc>::from(metadata.modified()?).format("%Y%m%dT%H%M%S%.3fZ");
    let id = path.file_stem().unwrap_or_default().to_string_lossy();
    let named = path.with_file_name(format!("{time}_unfinished_{}.wav", id.trim_start_matches('.')));
    if mode == Mode::Repair {
        rename_without_replacing(path, &named)?;
    }
    Ok(Adopted::Named(named))
}
