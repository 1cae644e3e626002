//! `live-meeting replay`

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::json;

use super::egress_sender::EgressSender;
use super::speech::livekit_pcm;
use super::video_clip::VideoClip;
use super::{ConfigArg, environment, start_logging};
use crate::app::ADMIN_KEY_FILE;
use crate::audio::format::PcmFormat;
use crate::config::{Config, Secret};
use crate::keys;
use crate::video::codec::{Container, VideoCodec};

/// Files are played one after the other, each on a connection of its own: audio as 48 kHz stereo, video as its pictures.
#[derive(Debug, clap::Args)]
#[command(
    after_long_help = "Files are played one after the other, each on a connection of its own, as the 48 kHz stereo that LiveKit sends.\nFiles of video (.ivf of VP8 or VP9, .h264 in Annex B at 30 pictures a second) go to /egress-video, a picture in each message.\nThe ticket comes from the server's API, with ADMIN_API_KEY or the key in the storage directory."
)]
pub struct ReplayArgs {
    /// The server [default: http://localhost:PORT]
    #[arg(long, value_name = "BASE")]
    url: Option<String>,
    /// Times real time, from 1, or `max`: as fast as the server reads
    #[arg(long, value_name = "N|max", default_value = "1", value_parser = parse_speed)]
    speed: Speed,
    /// Room name
    #[arg(long, value_name = "R", default_value = "replay")]
    room: String,
    /// Participant identity [default: the file's name]
    #[arg(long, value_name = "P")]
    participant: Option<String>,
    /// Track SID [default: made from the file's name]
    #[arg(long, value_name = "T")]
    track: Option<String>,
    #[command(flatten)]
    config: ConfigArg,
    /// WAV files of any rate and channel count; .ivf and .h264 files of video
    #[arg(required = true, value_name = "FILE.wav")]
    files: Vec<PathBuf>,
}

#[derive(Debug, Clone, Copy)]
enum Speed {
    Times(f64),
    Max,
}

impl Speed {
    fn times(self) -> Option<f64> {
        match self {
            Self::Times(times) => Some(times),
            Self::Max => None,
        }
    }
}

fn parse_speed(text: &str) -> Result<Speed, String> {
    if text == "max" {
        return Ok(Speed::Max);
    }
    let speed = text.parse().ok().filter(|speed: &f64| speed.is_finite() && *speed >= 1.0);
    speed.map(Speed::Times).ok_or_else(|| "expected a number from 1, or max".to_owned())
}

#[derive(Deserialize)]
struct Minted {
    ticket: String,
}

pub async fn run(args: ReplayArgs) -> anyhow::Result<ExitCode> {
    let env = environment()?;
    start_logging(&env, "warn");
    let config = Config::load(args.config.config.as_deref(), &env)?.config;
    let base = args.url.clone().unwrap_or_else(|| format!("http://localhost:{}", config.http.port));
    let base = base.trim_end_matches('/');
    let socket_base = match base.split_once("://") {
        Some(("http", rest)) => format!("ws://{rest}"),
        Some(("https", rest)) => format!("wss://{rest}"),
        _ => bail!("--url must start with http:// or https://"),
    };
    let key = admin_key(&config)?;
    for file in &args.files {
        play(&args, file, base, &socket_base, &key).await.with_context(|| file.display().to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn admin_key(config: &Config) -> anyhow::Result<Secret> {
    let path = config.storage.dir.join(ADMIN_KEY_FILE);
    match config.secrets.admin_api_key.clone() {
        Some(key) => Ok(key),
        None => keys::load(&path)?.with_context(|| format!("set ADMIN_API_KEY: there is no key in {}", path.display())),
    }
}

async fn play(args: &ReplayArgs, file: &Path, base: &str, socket_base: &str, key: &Secret) -> anyhow::Result<()> {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    if Container::of(file).is_video() {
        return play_video(args, file, &stem, base, socket_base, key).await;
    }
    let reading = file.to_owned();
    let pcm = actix_rt::task::spawn_blocking(move || livekit_pcm(std::io::BufReader::new(std::fs::File::open(&reading)?))).await??;
    let participant = args.participant.clone().unwrap_or_else(|| stem.clone());
    let track = args.track.clone().unwrap_or_else(|| format!("TR_{stem}"));
    let ticket = ticket(base, key, &args.room, &participant, &track, None).await?;
    let speed = args.speed.times();
    let room = crate::ticket::percent_encode(&args.room);
    let url = format!("{socket_base}/egress-audio?roomName={room}&ticket={ticket}");
    let mut sender = EgressSender::connect(&url, speed).await?;
    let bar = progress_bar(pcm.len(), &stem);
    sender.audio(&pcm, |bytes| bar.inc(u64::try_from(bytes).unwrap_or(0))).await?;
    sender.close().await?;
    bar.finish();
    let length = PcmFormat::LIVEKIT.duration(u64::try_from(pcm.len()).unwrap_or(0));
    println!("{}: {:.3} s recorded as room={:?} participant={participant:?} track={track:?}", file.display(), length.as_secs_f64(), args.room);
    Ok(())
}

async fn play_video(args: &ReplayArgs, file: &Path, stem: &str, base: &str, socket_base: &str, key: &Secret) -> anyhow::Result<()> {
    let reading = file.to_owned();
    let clip = actix_rt::task::spawn_blocking(move || VideoClip::read(Container::of(&reading), std::fs::read(&reading)?)).await??;
    let participant = args.participant.clone().unwrap_or_else(|| stem.to_owned());
    let track = args.track.clone().unwrap_or_else(|| format!("TR_{stem}"));
    let ticket = ticket(base, key, &args.room, &participant, &track, Some(clip.codec)).await?;
    let room = crate::ticket::percent_encode(&args.room);
    let url = format!("{socket_base}/egress-video?roomName={room}&ticket={ticket}");
    let mut sender = EgressSender::connect(&url, args.speed.times()).await?;
    let (bar, length, pictures) = (progress_bar(clip.bytes(), stem), clip.length(), clip.messages.len());
    for (due, message) in clip.messages {
        bar.inc(u64::try_from(message.len()).unwrap_or(0));
        sender.video(message, due).await?;
    }
    sender.close().await?;
    bar.finish();
    let seconds = length.as_secs_f64();
    println!(
        "{}: {pictures} pictures in {seconds:.3} s recorded as room={:?} participant={participant:?} track={track:?}",
        file.display(),
        args.room
    );
    Ok(())
}

async fn ticket(base: &str, key: &Secret, room: &str, participant: &str, track: &str, codec: Option<VideoCodec>) -> anyhow::Result<String> {
    let connector = awc::Connector::new().rustls_0_23(crate::analysis::tls::client_config(None)?);
    let client = awc::Client::builder().connector(connector).disable_redirects().timeout(Duration::from_secs(10)).finish();
    let body = json!({"roomName": room, "participant": participant, "trackId": track, "codec": codec});
    let request = client.post(format!("{base}/api/v1/tickets")).bearer_auth(key.expose());
    let mut response = request.send_json(&body).await.map_err(|error| anyhow::anyhow!("the server is not reached at {base}: {error}"))?;
    if !response.status().is_success() {
        bail!("the server made no ticket: {}", response.status());
    }
    let minted: Minted = response.json().await.map_err(|error| anyhow::anyhow!("the server's answer is not a ticket: {error}"))?;
    Ok(minted.ticket)
}

/// In bytes of 48 kHz stereo; shows seconds.
pub fn progress_bar(bytes: usize, name: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:>14} [{wide_bar}] {percent:>3} % {msg}").expect("a template of this program");
    let bar = ProgressBar::new(u64::try_from(bytes).unwrap_or(0)).with_style(style.progress_chars("=> "));
    bar.set_prefix(name.to_owned());
    bar
}
