//! `live-meeting repair`

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::ensure;
use comfy_table::{Cell, CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};

use super::{environment, start_logging};
use crate::audio::format::PcmFormat;
use crate::recording::repair::{Adopted, Found, Interrupted, Mode, Outcome, adopt, look, repair_all};
use crate::recording::sidecar::{MediaFormat, Sidecar};

/// Needs neither server nor database.
#[derive(Debug, clap::Args)]
#[command(
    after_long_help = "A recording without its sidecar (NAME.wav.json, .ivf.json, .h264.json) was interrupted: its header is made to say its true length, and it gets a sidecar.\nFinished recordings are not touched, nor is what a running server writes; nothing is deleted. Exits with 1 if a file could not be repaired."
)]
pub struct RepairArgs {
    /// Say what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Where recordings are, such as storage/egress/audio or storage/egress
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

pub fn run(args: &RepairArgs) -> anyhow::Result<ExitCode> {
    start_logging(&environment()?, "error");
    ensure!(args.dir.is_dir(), "{} is not a directory", args.dir.display());
    let mode = if args.dry_run { Mode::DryRun } else { Mode::Repair };
    let Found { unsealed, sealed, unfinished, unread } = look(&args.dir);
    let mut files: Vec<Interrupted> = unsealed.into_iter().map(Interrupted::file).collect();
    let mut rows: Vec<Row> = unread.into_iter().map(|(path, error)| Row::of(&args.dir, &path, &Err(error), mode)).collect();
    for path in unfinished {
        match adopt(&path, mode) {
            Ok(Adopted::Named(named)) => files.push(Interrupted::file(if mode == Mode::DryRun { path } else { named })),
            Ok(Adopted::Left) => {}
            Err(error) => rows.push(Row::of(&args.dir, &path, &Err(error), mode)),
        }
    }
    let bar = bar(files.len());
    let outcomes = repair_all(&files, mode, || bar.inc(1));
    rows.extend(files.iter().zip(outcomes).map(|(file, outcome)| Row::of(&args.dir, &file.path, &outcome, mode)));
    bar.finish_and_clear();
    if !rows.is_empty() {
        println!("{}", table(&rows));
    }
    let count = |kind| rows.iter().filter(|row| row.kind == kind).count();
    let (repaired, faults) = (count(Kind::Repaired), count(Kind::Fault));
    let verb = if args.dry_run { "to repair" } else { "repaired" };
    println!("{repaired} {verb}, {} finished before, {} in use, {faults} at fault", sealed.len() + count(Kind::Sealed), count(Kind::InUse));
    Ok(if faults == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Repaired,
    Sealed,
    InUse,
    Fault,
}

struct Row {
    kind: Kind,
    file: String,
    what: String,
    length: Option<String>,
}

impl Row {
    fn of(dir: &Path, path: &Path, outcome: &io::Result<Outcome>, mode: Mode) -> Self {
        let (kind, what, length) = match outcome {
            Ok(Outcome::Recovered(sidecar)) => (Kind::Repaired, recovered(sidecar, mode), Some(length(sidecar))),
            Ok(Outcome::Sealed(sidecar)) => (Kind::Sealed, "finished meanwhile".to_owned(), Some(length(sidecar))),
            Ok(Outcome::Bad(aside)) => {
                (Kind::Repaired, format!("holds nothing, kept as {}", aside.file_name().unwrap_or_default().to_string_lossy()), None)
            }
            Ok(Outcome::InUse) => (Kind::InUse, "left alone: it is being written".to_owned(), None),
            Err(error) => (Kind::Fault, format!("cannot be repaired: {error}"), None),
        };
        Self { kind, file: path.strip_prefix(dir).unwrap_or(path).display().to_string(), what, length }
    }
}

fn recovered(sidecar: &Sidecar, mode: Mode) -> String {
    let mut what = if mode == Mode::DryRun { "to be repaired" } else { "repaired" }.to_owned();
    if sidecar.suspect {
        what.push_str(", but suspect: what was written of it may not be on the disk");
    }
    if sidecar.tail_unverified_ms > 0 {
        what.push_str(&format!(", the last {} ms may be spoilt", sidecar.tail_unverified_ms));
    }
    what
}

fn length(sidecar: &Sidecar) -> String {
    match sidecar.format {
        MediaFormat::Wav => {
            let format = sidecar.pcm_format().unwrap_or(PcmFormat::LIVEKIT);
            format!("{:.2} s", format.duration_of_frames(sidecar.frames).as_secs_f64())
        }
        MediaFormat::H264 | MediaFormat::Ivf => format!("{} pictures", sidecar.frames),
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["file", "what became of it", "length"]);
    for row in rows {
        let length = Cell::new(row.length.as_deref().unwrap_or_default()).set_alignment(CellAlignment::Right);
        table.add_row([Cell::new(&row.file), Cell::new(&row.what), length]);
    }
    table
}

fn bar(files: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:>14} [{wide_bar}] {pos} of {len}").expect("a template of this program");
    let bar = ProgressBar::new(u64::try_from(files).unwrap_or_default()).with_style(style.progress_chars("=> "));
    bar.set_prefix("repairing");
    bar
}
