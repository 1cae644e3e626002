//! Finds what a crash left below a directory. Links are not followed.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};

use super::Mode;
use crate::recording::root::rename_without_replacing;
use crate::recording::sidecar::{no_follow, path_of};
use crate::recording::wav_header::{self, HEADER_BYTES};
use crate::recording::{ivf, lock};
use crate::video::codec::Container;

/// What lies below a directory, sorted.
#[derive(Debug, Default)]
pub struct Found {
    /// Recordings without a sidecar.
    pub unsealed: Vec<PathBuf>,
    /// Recordings with one.
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
        } else if kind.is_file() && Container::by_extension(&path).is_some() {
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
    /// It holds audio or video and has this name now: it can be repaired.
    Named(PathBuf),
    /// It holds nothing, or what no header speaks of, or is being written: left as it is.
    Left,
}

/// Gives a file of a segment in its first moment a name, if it holds audio or video.
///
/// # Errors
/// What the file system says.
pub fn adopt(path: &Path, mode: Mode) -> io::Result<Adopted> {
    let file = no_follow(OpenOptions::new().read(true)).open(path)?;
    if !lock::hold(&file)? {
        return Ok(Adopted::Left);
    }
    let metadata = file.metadata()?;
    let mut beginning = Vec::new();
    (&file).take(HEADER_BYTES + 1).read_to_end(&mut beginning)?;
    let Some(container) = recognize(&beginning) else { return Ok(Adopted::Left) };
    let time = DateTime::<Utc>::from(metadata.modified()?).format("%Y%m%dT%H%M%S%.3fZ");
    let id = path.file_stem().unwrap_or_default().to_string_lossy();
    let named = path.with_file_name(format!("{time}_unfinished_{}.{}", id.trim_start_matches('.'), container.as_str()));
    if mode == Mode::Repair {
        rename_without_replacing(path, &named)?;
    }
    Ok(Adopted::Named(named))
}

/// What a file is that begins like this, if it holds more than a header.
fn recognize(beginning: &[u8]) -> Option<Container> {
    let is_wav = |(header, rest): (&[u8; 44], &[u8])| wav_header::format_of(header).is_some() && !rest.is_empty();
    let is_ivf = |(header, rest): (&[u8; 32], &[u8])| ivf::decode_header(header).is_some() && !rest.is_empty();
    if beginning.split_first_chunk().is_some_and(is_wav) {
        Some(Container::Wav)
    } else if beginning.split_first_chunk().is_some_and(is_ivf) {
        Some(Container::Ivf)
    } else {
        // More zeros in front are allowed, but are rather what never reached the disk.
        let begins = beginning.starts_with(&[0, 0, 1]) || beginning.starts_with(&[0, 0, 0, 1]);
        begins.then_some(Container::H264)
    }
}
