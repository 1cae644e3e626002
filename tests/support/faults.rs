//! Faults that the system itself has: small disks, failing and slow calls, limits. What a machine does not allow is `None`, said in a line.

use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use tempfile::TempDir;

use super::machine::{has_tools, skip};
pub use super::strace::Strace;

/// A file system in memory beneath a server's directory.
pub struct SmallDisk {
    pub path: PathBuf,
    /// Of the server that is to run on it.
    pub dir: Arc<TempDir>,
}

impl SmallDisk {
    /// 64 MiB at this place of a new directory.
    pub fn mount(place: &str) -> Option<Self> {
        Self::of_size(place, "64m")
    }

    /// The same of another size, as `mount` takes it.
    pub fn of_size(place: &str, size: &str) -> Option<Self> {
        let dir = Arc::new(TempDir::new().expect("a directory"));
        let path = dir.path().join(place);
        std::fs::create_dir_all(&path).expect("made");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size},mode=750"), "tmpfs"]).arg(&path).stderr(Stdio::null()).status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self { path, dir });
        }
        skip("a small disk", "none can be mounted here");
        None
    }

    /// Takes all the room but `spare` bytes, until the ballast is dropped.
    pub fn fill(&self, spare: u64) -> Ballast {
        let path = self.path.join(".ballast");
        let mut file = std::fs::File::create(&path).expect("made");
        let space = rustix::fs::fstatvfs(file.as_fd()).expect("measured");
        let mut bytes = (space.f_bavail * space.f_frsize).saturating_sub(spare);
        let block = [0xAA; 65_536];
        while bytes > 0 {
            let next = block.len().min(bytes as usize);
            match file.write(&block[..next]) {
                Ok(written) => bytes -= written as u64,
                Err(error) => {
                    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
                    break;
                }
            }
        }
        Ballast(path)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Whoever still runs on it keeps it until its end.
        let unmounted = Command::new("umount").arg("--lazy").arg(&self.path).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

/// What fills a disk.
pub struct Ballast(PathBuf);

impl Drop for Ballast {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).expect("removed");
    }
}

/// The frames that SoX, ffprobe and Python find in a WAV file, of those that are installed. None of them may complain.
pub fn frames_for_players(path: &Path) -> Vec<(&'static str, u64)> {
    const PYTHON: &str = "import sys, wave; w = wave.open(sys.argv[1]); print(len(w.readframes(1 << 30)) // w.getsampwidth() // w.getnchannels())";
    let players: [(&str, &[&str]); 3] = [
        ("python3", &["-c", PYTHON]),
        ("ffprobe", &["-v", "warning", "-show_entries", "stream=duration_ts", "-of", "default=nw=1:nk=1"]),
        ("soxi", &["-s"]),
    ];
    let frames = |(player, args): (&'static str, &[&str])| {
        if !has_tools("reading with one of three players", &[player]) {
            return None;
        }
        let output = Command::new(player).args(args).arg(path).output().expect("it runs");
        let [said, complained] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).expect("text"));
        assert!(output.status.success() && complained.is_empty(), "{player}: {complained}");
        Some((player, said.trim().parse().unwrap_or_else(|_| panic!("{player}: {said}"))))
    };
    players.into_iter().filter_map(frames).collect()
}
