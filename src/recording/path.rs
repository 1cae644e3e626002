//! File names made of names that strangers chose.
//!
//! `<audio dir>/<meetingId>/<timestamp>_<room>_<participant>_<track>.wav`, and below the video directory the same with `.h264` or `.ivf`. Every part goes through [`safe_part`]; nothing else reaches a path.

use std::io;
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use sha2::{Digest, Sha256};

use crate::video::codec::Container;

/// The longest part of a name in bytes. Four of them and a time stamp stay below the 255 bytes of common file systems.
const PART_BYTES: usize = 48;
/// Bytes of the digest that tell changed names apart: a hyphen and eight hex digits.
const DIGEST_BYTES: usize = 9;

/// What a segment file is named after.
#[derive(Debug, Clone)]
pub struct SegmentName {
    pub meeting: String,
    pub room: String,
    pub participant: Option<String>,
    pub track: Option<String>,
}

impl SegmentName {
    /// The meeting's directory, relative to the audio directory.
    pub fn directory(&self) -> PathBuf {
        PathBuf::from(safe_part(Some(&self.meeting)))
    }

    /// The file's path, relative to the audio directory. `time` is that of the first sample.
    pub fn file(&self, time: DateTime<Utc>) -> PathBuf {
        self.file_of(time, Container::Wav)
    }

    /// The path of a file of any kind, relative to its directory. `time` is that of the first sample or picture.
    pub fn file_of(&self, time: DateTime<Utc>, container: Container) -> PathBuf {
        let part = |text: &Option<String>| safe_part(text.as_deref());
        let (time, room, extension) = (time.format("%Y%m%dT%H%M%S%.3fZ"), safe_part(Some(&self.room)), container.as_str());
        self.directory().join(format!("{time}_{room}_{}_{}.{extension}", part(&self.participant), part(&self.track)))
    }
}

/// A part of a file name: `[A-Za-z0-9._-]`, no leading dot, at most 48 bytes; `unknown` for an absent part.
///
/// Whatever has to change gets the first 32 bits of the original's SHA-256 behind it, so different originals keep different names.
pub fn safe_part(original: Option<&str>) -> String {
    let Some(original) = original.filter(|text| !text.is_empty()) else { return "unknown".to_owned() };
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if original.len() <= PART_BYTES && original.chars().all(allowed) && !original.starts_with('.') {
        return original.to_owned();
    }
    let mut name: String = original.chars().take(PART_BYTES - DIGEST_BYTES).map(|c| if allowed(c) { c } else { '_' }).collect();
    if name.starts_with('.') {
        name.replace_range(..1, "_");
    }
    let digest = Sha256::digest(original.as_bytes());
    let hex: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    format!("{name}-{hex}")
}

/// Resolves a stored relative path below the audio directory. `None` for one that would leave it.
pub fn below(audio_dir: &Path, relative: &str) -> Option<PathBuf> {
    let relative = Path::new(relative);
    let plain = relative.components().all(|component| matches!(component, std::path::Component::Normal(_)));
    plain.then(|| audio_dir.join(relative))
}

/// The same, for work that goes by path. What is found by looking is found without.
///
/// # Errors
/// What the file system says; [`io::ErrorKind::NotFound`] for a path that leaves the directory, by itself or by a directory on the way that is a link.
pub fn straight_below(directory: &Path, relative: &str) -> io::Result<PathBuf> {
    let path = below(directory, relative).ok_or(io::ErrorKind::NotFound)?;
    let parent = path.parent().ok_or(io::ErrorKind::NotFound)?;
    let beneath = parent.strip_prefix(directory).map_err(io::Error::other)?;
    if parent.canonicalize()? == directory.canonicalize()?.join(beneath) { Ok(path) } else { Err(io::ErrorKind::NotFound.into()) }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn ordinary_livekit_names_stay_as_they_are() {
        let name =
            SegmentName { meeting: "RM_abc".into(), room: "stand-up".into(), participant: Some("ana.b".into()), track: Some("TR_AMx9".into()) };
        let time = DateTime::parse_from_rfc3339("2026-11-20T10:53:12.345Z").expect("a time").to_utc();
        assert_eq!(name.file(time), Path::new("RM_abc/20261120T105312.345Z_stand-up_ana.b_TR_AMx9.wav"));
    }

    #[test]
    fn an_absent_part_is_unknown() {
        assert_eq!(safe_part(None), "unknown");
        assert_eq!(safe_part(Some("")), "unknown");
    }

    #[test]
    fn hostile_names_are_safe_and_stay_apart() {
        let long = "x".repeat(300);
        let longer = format!("{long}y");
        let umlauts = "ä".repeat(60);
        let hostile =
            ["../../etc/passwd", "..", ".", ".hidden", "a/b", "a\\b", "a\0b", "a b", "会議", "会义", "C:", "a\nb", &long, &longer, &umlauts];
        let names: Vec<String> = hostile.iter().map(|name| safe_part(Some(name))).collect();
        for name in &names {
            assert!(name.len() <= PART_BYTES, "{name}");
            assert!(!name.starts_with('.'), "{name}");
            assert!(name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)), "{name}");
        }
        assert_eq!(names.iter().collect::<HashSet<_>>().len(), hostile.len(), "{names:?}");
    }

    #[test]
    fn a_stored_path_cannot_leave_the_audio_directory() {
        let dir = Path::new("/audio");
        assert_eq!(below(dir, "RM/x.wav"), Some(PathBuf::from("/audio/RM/x.wav")));
        for escape in ["../x.wav", "/etc/passwd", "RM/../../x", "."] {
            assert_eq!(below(dir, escape), None, "{escape}");
        }
    }

    #[test]
    fn s3_a_path_behind_a_link_is_not_straight() {
        let dir = tempfile::tempdir().expect("a directory");
        let (root, link) = (dir.path().join("root"), dir.path().join("link"));
        std::fs::create_dir_all(root.join("RM")).expect("made");
        std::os::unix::fs::symlink(&root, &link).expect("the operator's link");
        std::os::unix::fs::symlink("RM", root.join("RM_2")).expect("linked");
        // What is not there is not found either.
        for directory in [&root, &link] {
            let found = ["RM/x.wav", "x.wav", "RM_3/x.wav", "RM_2/x.wav", "../x.wav"]
                .map(|path| straight_below(directory, path).map_err(|error| error.kind()));
            assert_eq!(
                found,
                [Some("RM/x.wav"), Some("x.wav"), None, None, None].map(|path| path.map(|path| directory.join(path)).ok_or(io::ErrorKind::NotFound))
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_makes_one_harmless_component(text in ".{0,400}") {
            let part = safe_part(Some(&text));
            proptest::prop_assert!(part.len() <= PART_BYTES);
            proptest::prop_assert_eq!(Path::new(&part).components().count(), 1);
            proptest::prop_assert!(!part.starts_with('.'));
        }
    }
}
