//! `live-meeting demo`: a server, a meeting of two speakers, and what became of it, in one process.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use awc::Client;
use chrono::Utc;
use comfy_table::{Cell, CellAlignment, Table, presets};
use indicatif::MultiProgress;
use serde_json::{Value, json};

use super::egress_sender::EgressSender;
use super::replay::progress_bar;
use super::serve::{Signals, keep_files_private, until_told};
use super::speech::livekit_pcm;
use super::{ConfigArg, environment, start_logging};
use crate::app::{self, ADMIN_KEY_FILE, Server};
use crate::audio::format::PcmFormat;
use crate::audio::level::{Level, peak_dbfs};
use crate::config::{Config, DatabaseUrl, IngestAuth, Secret};
use crate::ids::{Identity, RoomName, TrackSid};
use crate::livekit::webhook::sign;
use crate::ticket::{TicketKind, TicketSubject, socket_url};

const ROOM: &str = "demo";
const API_KEY: &str = "demo-key";
/// Spoken by espeak-ng; `assets/README.md` says how they were made.
const SPEAKERS: [(&str, &[u8]); 2] = [("ana", include_bytes!("../../assets/ana.wav")), ("bruno", include_bytes!("../../assets/bruno.wav"))];
/// Who is muted in the middle, and for how long.
const MUTED: &str = "bruno";
const MUTED_FOR: Duration = Duration::from_secs(2);
/// How long before the audio that it speaks of LiveKit's mute text comes (`docs/FACTS.md`, egress socket).
const TEXT_LEAD: Duration = Duration::from_secs(2);

/// Starts a server on the embedded database, plays LiveKit's part with signed webhooks and two recordings, prints what was recorded, and goes on
/// serving. Keeps everything under storage/demo.
#[derive(Debug, clap::Args)]
#[command(
    after_long_help = "Starts a server on the embedded database, plays LiveKit's part with signed webhooks and two recordings,\nprints what was recorded, and goes on serving. PORT and the rest of the configuration are honoured,\nand everything is kept under storage/demo."
)]
pub struct DemoArgs {
    /// Exit after the meeting instead of serving on
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    config: ConfigArg,
}

pub async fn run(args: DemoArgs) -> anyhow::Result<ExitCode> {
    let env = environment()?;
    start_logging(&env, "warn");
    let directory = PathBuf::from("storage/demo");
    let secret = random_hex()?;
    let mut config = Config::load(args.config.config.as_deref(), &env)?.config;
    config.storage.dir.clone_from(&directory);
    config.storage.audio_dir = directory.join("egress/audio");
    config.storage.video_dir = directory.join("egress/video");
    config.storage.pipeline_log_dir = directory.join("pipeline-logs");
    config.database.url = DatabaseUrl::Sqlite(directory.join("live-meeting.db"));
    config.livekit.api_key = Some(API_KEY.to_owned());
    config.secrets.livekit_api_secret = Some(Secret::new(&secret));
    config.secrets.livekit_keys = vec![(API_KEY.to_owned(), Secret::new(&secret))];
    config.ingest.auth = IngestAuth::Ticket;
    let has_own_key = config.secrets.admin_api_key.is_none();
    let (audio_dir, log_dir) = (config.storage.audio_dir.clone(), config.storage.pipeline_log_dir.clone());

    keep_files_private();
    let mut signals = Signals::listen()?;
    let server = app::start(config).await?;
    let base = format!("localhost:{}", server.address.port());
    println!("Live Meeting serves http://{base} and keeps everything in {}.", directory.display());
    let meeting = Meeting::new(&server, &base, secret)?;
    let held = tokio::select! {
        held = meeting.hold() => held,
        () = signals.wait() => Err(anyhow::anyhow!("interrupted")),
    };
    if let Err(error) = held {
        server.stop().await;
        return Err(error);
    }
    meeting.report(&audio_dir, &log_dir).await?;
    if args.once {
        server.stop().await;
        return Ok(ExitCode::SUCCESS);
    }
    let key = if has_own_key { format!("$(cat {})", directory.join(ADMIN_KEY_FILE).display()) } else { "$ADMIN_API_KEY".to_owned() };
    println!("\nThe server goes on; Ctrl-C ends it. What it knows of the meeting:");
    println!("  curl -H \"Authorization: Bearer {key}\" http://{base}/api/v1/sessions/{}", meeting.sid);
    println!("  curl -H \"Authorization: Bearer {key}\" 'http://{base}/api/v1/recordings?meetingId={}'", meeting.sid);
    until_told(server, &mut signals).await;
    Ok(ExitCode::SUCCESS)
}

fn random_hex() -> anyhow::Result<String> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|error| anyhow::anyhow!("the machine has no randomness: {error}"))?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// As long as LiveKit's.
fn sid(kind: &str) -> anyhow::Result<String> {
    Ok(format!("{kind}_{:.12}", random_hex()?))
}

/// A meeting as LiveKit would tell it.
struct Meeting<'a> {
    server: &'a Server,
    base: &'a str,
    secret: String,
    sid: String,
    client: Client,
    speakers: Vec<Speaker>,
}

struct Speaker {
    name: &'static str,
    track: String,
    pcm: Vec<u8>,
    /// Where the audio is cut for the muted part, in bytes.
    muted_at: Option<usize>,
}

impl<'a> Meeting<'a> {
    fn new(server: &'a Server, base: &'a str, secret: String) -> anyhow::Result<Self> {
        let speakers = SPEAKERS.iter().map(|(name, file)| Speaker::new(name, file)).collect::<anyhow::Result<_>>()?;
        let client = Client::builder().timeout(Duration::from_secs(10)).finish();
        Ok(Self { server, base, secret, sid: sid("RM")?, client, speakers })
    }

    /// Opens the room, lets everybody speak, and closes it.
    async fn hold(&self) -> anyhow::Result<()> {
        println!("A meeting of two begins.");
        self.webhook("room_started", json!({})).await?;
        for speaker in &self.speakers {
            let participant = json!({"sid": format!("PA_{}", speaker.name), "identity": speaker.name, "name": speaker.name, "state": "ACTIVE"});
            self.webhook("participant_joined", json!({"participant": participant})).await?;
            let track = json!({"sid": speaker.track, "source": "MICROPHONE", "mimeType": "audio/opus"});
            let participant = json!({"sid": format!("PA_{}", speaker.name), "identity": speaker.name});
            self.webhook("track_published", json!({"participant": participant, "track": track})).await?;
        }
        let bars = MultiProgress::new();
        let (first, second) = match self.speakers.as_slice() {
            [first, second] => (first, second),
            _ => bail!("the demonstration has two speakers"),
        };
        tokio::try_join!(self.speak(first, &bars), self.speak(second, &bars))?;
        self.webhook("room_finished", json!({})).await?;
        println!("The meeting has ended.");
        Ok(())
    }

    async fn speak(&self, speaker: &Speaker, bars: &MultiProgress) -> anyhow::Result<()> {
        let subject = TicketSubject {
            participant: Some(Identity::new(speaker.name)),
            track_id: Some(TrackSid::new(&speaker.track)),
            ..TicketSubject::of_room(RoomName::new(ROOM))
        };
        let (text, ticket) = self.server.mint.mint(TicketKind::Audio, subject, Utc::now());
        let url = socket_url(&format!("ws://{}", self.base), &ticket, &text);
        let mut sender = EgressSender::connect(&url, Some(1.0)).await?;
        println!("{} speaks.", speaker.name);
        let bar = bars.add(progress_bar(speaker.pcm.len(), speaker.name));
        let progress = |bytes| bar.inc(u64::try_from(bytes).unwrap_or(0));
        if let Some(muted_at) = speaker.muted_at {
            let lead = bytes(TEXT_LEAD);
            let (unmuted_at, say) = (muted_at + bytes(MUTED_FOR), |text: &'static str| bar.set_message(text));
            let [start, muted, end] = [0, muted_at.saturating_sub(lead), unmuted_at - lead];
            sender.audio(part(&speaker.pcm, start, muted), progress).await?;
            sender.muted(true).await?;
            say("muted");
            println!("{} is muted: the text comes 2 s before the silence.", speaker.name);
            sender.audio(part(&speaker.pcm, muted, end), progress).await?;
            sender.muted(false).await?;
            say("");
            println!("{} is unmuted.", speaker.name);
            sender.audio(part(&speaker.pcm, end, speaker.pcm.len()), progress).await?;
        } else {
            sender.audio(&speaker.pcm, progress).await?;
        }
        bar.finish();
        sender.close().await.with_context(|| format!("{}'s track", speaker.name))
    }

    /// Delivers an event as LiveKit does: signed, and answered by 204.
    async fn webhook(&self, event: &str, more: Value) -> anyhow::Result<()> {
        let mut body = json!({
            "event": event,
            "id": format!("EV_{}", random_hex()?),
            "createdAt": Utc::now().timestamp().to_string(),
            "room": {"sid": self.sid, "name": ROOM},
        });
        if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
            body.extend(more);
        }
        let body = body.to_string();
        let request = self.client.post(format!("http://{}/livekit/webhook", self.base)).content_type("application/webhook+json");
        let request = request.insert_header(("Authorization", sign(API_KEY, &self.secret, body.as_bytes())?));
        let response = request.send_body(body).await.map_err(|error| anyhow::anyhow!("the webhook {event} was not taken: {error}"))?;
        ensure!(response.status() == 204, "the webhook {event} was answered by {}", response.status());
        Ok(())
    }

    async fn get(&self, path: &str) -> anyhow::Result<Value> {
        let request = self.client.get(format!("http://{}/api/v1{path}", self.base)).bearer_auth(self.server.admin_key.expose());
        let mut response = request.send().await.map_err(|error| anyhow::anyhow!("{path}: {error}"))?;
        ensure!(response.status().is_success(), "{path} was answered by {}", response.status());
        response.json().await.map_err(|error| anyhow::anyhow!("{path}: {error}"))
    }

    /// Says what the API and the files say.
    async fn report(&self, audio_dir: &Path, log_dir: &Path) -> anyhow::Result<()> {
        let session = self.get(&format!("/sessions/{}", self.sid)).await?;
        let recordings = self.get(&format!("/recordings?meetingId={}", self.sid)).await?;
        let recordings = recordings.get("items").and_then(Value::as_array).context("the API lists no recordings")?;
        ensure!(recordings.len() == SPEAKERS.len(), "{} recordings were made, not {}", recordings.len(), SPEAKERS.len());
        let mut table = Table::new();
        table.load_style(presets::UTF8_HORIZONTAL_ONLY);
        table.set_header(["speaker", "file", "duration", "groups", "peak level"]);
        for recording in recordings.iter().rev() {
            let text = |pointer| recording.pointer(pointer).and_then(Value::as_str);
            let participant = text("/participant").unwrap_or_default();
            let path = audio_dir.join(text("/segments/0/path").context("a recording has no file")?);
            let seconds = recording.pointer("/segments/0/seconds").and_then(Value::as_f64).context("a segment has no length")?;
            let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
            table.add_row([
                Cell::new(participant),
                Cell::new(path.display()),
                right(format!("{seconds:.2} s")),
                right(self.groups(log_dir, participant, seconds).await?.to_string()),
                right(peak_dbfs(file_peak(&path)?).map_or("silent".to_owned(), |peak| format!("{peak:.1} dBFS"))),
            ]);
        }
        println!("\nSession {} is {}. Recorded:\n{table}", self.sid, session.get("status").and_then(Value::as_str).unwrap_or("unknown"));
        Ok(())
    }

    /// The groups of a speaker by the pipeline log, once it accounts for all of the audio.
    async fn groups(&self, log_dir: &Path, participant: &str, seconds: f64) -> anyhow::Result<usize> {
        let path = log_dir.join(format!("{}.log", self.sid));
        let complete = async {
            loop {
                let log = tokio::fs::read_to_string(&path).await.unwrap_or_default();
                let name = format!("participant={participant:?}");
                let lines: Vec<&str> = log.lines().filter(|line| line.contains(&name)).collect();
                let duration = |line: &&str| line.split("duration_ms=").nth(1)?.split(' ').next()?.parse::<u32>().ok();
                let logged: u32 = lines.iter().filter_map(duration).sum();
                if f64::from(logged) + 100.0 >= seconds * 1000.0 {
                    return lines.len();
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), complete).await.with_context(|| format!("{} is not complete", path.display()))
    }
}

impl Speaker {
    fn new(name: &'static str, file: &[u8]) -> anyhow::Result<Self> {
        let mut pcm = livekit_pcm(file)?;
        let muted_at = (name == MUTED).then(|| pcm.len() / 2 / 1_920 * 1_920);
        if let Some(muted_at) = muted_at {
            // While a track is muted LiveKit sends exact zeros.
            pcm.splice(muted_at..muted_at, vec![0; bytes(MUTED_FOR)]);
        }
        Ok(Self { name, track: sid("TR")?, pcm, muted_at })
    }
}

fn bytes(span: Duration) -> usize {
    usize::try_from(PcmFormat::LIVEKIT.bytes_in(span)).unwrap_or(usize::MAX)
}

fn part(pcm: &[u8], from: usize, to: usize) -> &[u8] {
    pcm.get(from..to).unwrap_or_default()
}

fn file_peak(path: &Path) -> anyhow::Result<u16> {
    let file = std::fs::read(path).with_context(|| path.display().to_string())?;
    Ok(Level::of(file.get(44..).unwrap_or_default()).peak)
}
