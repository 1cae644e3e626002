//! What is true in the fake: rooms, participants, tracks. Every change pushes the webhooks that LiveKit would send onto a list.
//!
//! The truth is kept in LiveKit's own messages, so the API and the webhooks say the same. Shapes follow `tests/fixtures/livekit-1.13.5.jsonl`.

use std::collections::HashMap;

use chrono::Utc;
use livekit_protocol as proto;
use proto::client_info::Capability;
use proto::participant_info::{Kind, State as Connection};
use proto::{BackupCodecPolicy, DisconnectReason, TrackSource, TrackType};

use super::pcm::Audio;

/// A participant to come.
#[derive(Clone, Debug)]
pub struct Participant {
    pub info: proto::ParticipantInfo,
}

/// A participant with everything else left at its default.
pub fn person(identity: &str) -> Participant {
    let permission =
        proto::ParticipantPermission { can_subscribe: true, can_publish: true, can_publish_data: true, ..proto::ParticipantPermission::default() };
    let info = proto::ParticipantInfo {
        identity: identity.to_owned(),
        permission: Some(permission),
        client_protocol: 2,
        capabilities: vec![Capability::CapPacketTrailer.into(), Capability::CapCompressionDeflateRaw.into()],
        ..proto::ParticipantInfo::default()
    };
    Participant { info }
}

impl Participant {
    pub fn name(mut self, name: &str) -> Self {
        self.info.name = name.to_owned();
        self
    }

    pub fn kind(mut self, kind: Kind) -> Self {
        self.info.kind = kind.into();
        self
    }

    pub fn metadata(mut self, metadata: &str) -> Self {
        self.info.metadata = metadata.to_owned();
        self
    }

    pub fn attribute(mut self, name: &str, value: &str) -> Self {
        self.info.attributes.insert(name.to_owned(), value.to_owned());
        self
    }
}

/// A track to come, and what is heard on it.
#[derive(Clone, Debug)]
pub struct Track {
    pub info: proto::TrackInfo,
    pub audio: Audio,
}

/// A microphone whose sound counts up.
pub fn mic() -> Track {
    track(TrackType::Audio, TrackSource::Microphone, "mic", "audio/red")
}

/// The sound of a shared screen.
pub fn screen_audio() -> Track {
    track(TrackType::Audio, TrackSource::ScreenShareAudio, "screen-audio", "audio/red")
}

pub fn camera() -> Track {
    track(TrackType::Video, TrackSource::Camera, "camera", "video/VP8")
}

fn track(kind: TrackType, source: TrackSource, name: &str, mime: &str) -> Track {
    let (name, mime_type) = (name.to_owned(), mime.to_owned());
    let info = proto::TrackInfo { r#type: kind.into(), source: source.into(), name, mime_type, ..proto::TrackInfo::default() };
    Track { info, audio: Audio::Counter }
}

impl Track {
    pub fn name(mut self, name: &str) -> Self {
        self.info.name = name.to_owned();
        self
    }

    pub fn mime(mut self, mime: &str) -> Self {
        self.info.mime_type = mime.to_owned();
        self
    }

    /// Published in the muted state.
    pub fn muted(mut self) -> Self {
        self.info.muted = true;
        self
    }

    pub fn encrypted(mut self) -> Self {
        self.info.encryption = proto::encryption::Type::Gcm.into();
        self
    }

    pub fn audio(mut self, audio: Audio) -> Self {
        self.audio = audio;
        self
    }
}

/// A room, and who is in it, hidden participants too.
#[derive(Debug)]
pub struct Room {
    pub info: proto::Room,
    pub participants: Vec<proto::ParticipantInfo>,
}

#[derive(Clone, Debug)]
pub struct Sound {
    pub audio: Audio,
    pub muted: bool,
    pub mime: String,
}

#[derive(Debug, Default)]
pub struct World {
    pub rooms: Vec<Room>,
    /// Of every track that is published now, by its SID.
    pub sounds: HashMap<String, Sound>,
    /// Webhooks to be queued, in order.
    pub outbox: Vec<proto::WebhookEvent>,
}

impl World {
    pub fn room(&self, name: &str) -> Option<&Room> {
        self.rooms.iter().find(|room| room.info.name == name)
    }

    fn room_mut(&mut self, name: &str) -> &mut Room {
        self.rooms.iter_mut().find(|room| room.info.name == name).unwrap_or_else(|| panic!("there is no room {name:?}"))
    }

    pub fn participant(&self, room: &str, identity: &str) -> Option<&proto::ParticipantInfo> {
        self.room(room)?.participants.iter().find(|participant| participant.identity == identity)
    }

    pub fn has_track(&self, room: &str, track: &str) -> bool {
        self.room(room).is_some_and(|room| room.participants.iter().flat_map(|participant| &participant.tracks).any(|known| known.sid == track))
    }

    /// The SID of the running room of this name, which is started if there is none.
    pub fn start_room(&mut self, name: &str, metadata: &str) -> String {
        if let Some(room) = self.room(name) {
            return room.info.sid.clone();
        }
        let now = Utc::now();
        let codecs = ["audio/PCMU", "audio/PCMA", "audio/opus", "audio/red", "video/VP8", "video/H264"];
        let info = proto::Room {
            sid: sid("RM_"),
            name: name.to_owned(),
            empty_timeout: 300,
            departure_timeout: 20,
            creation_time: now.timestamp(),
            creation_time_ms: now.timestamp_millis(),
            turn_password: sid("turn-password-"),
            enabled_codecs: codecs.map(|mime| proto::Codec { mime: mime.to_owned(), ..proto::Codec::default() }).into(),
            metadata: metadata.to_owned(),
            ..proto::Room::default()
        };
        self.outbox.push(event("room_started", &info));
        let sid = info.sid.clone();
        self.rooms.push(Room { info, participants: Vec::new() });
        sid
    }

    pub fn set_room_metadata(&mut self, name: &str, metadata: &str) {
        self.room_mut(name).info.metadata = metadata.to_owned(); // LiveKit sends no webhook for it
    }

    /// The participant's SID. The room is started if there is none; an earlier participant of the same identity is sent out.
    pub fn join(&mut self, room: &str, participant: Participant) -> String {
        self.start_room(room, "");
        let mut info = participant.info;
        if self.participant(room, &info.identity).is_some() {
            self.leave(room, &info.identity, DisconnectReason::DuplicateIdentity);
        }
        let now = Utc::now();
        info.sid = sid("PA_");
        (info.state, info.version) = (Connection::Active.into(), 2);
        (info.joined_at, info.joined_at_ms) = (now.timestamp(), now.timestamp_millis());
        self.about_participant("participant_joined", room, &info);
        let sid = info.sid.clone();
        self.room_mut(room).participants.push(info);
        sid
    }

    /// An egress joins the room that it records (docs/FACTS.md, webhooks).
    pub fn join_egress(&mut self, room: &str, egress_id: &str) {
        if self.room(room).is_none() {
            return;
        }
        let mut egress = person(egress_id).kind(Kind::Egress);
        let permission = egress.info.permission.get_or_insert_default();
        (permission.hidden, permission.can_publish, permission.can_publish_data) = (true, false, false);
        self.join(room, egress);
    }

    /// The track's SID. The room and the participant are made if they are not there.
    pub fn publish(&mut self, room: &str, identity: &str, track: Track) -> String {
        if self.participant(room, identity).is_none() {
            self.join(room, person(identity));
        }
        let mut info = track.info;
        let video = info.r#type == i32::from(TrackType::Video);
        info.sid = sid(if video { "TR_VC" } else { "TR_AM" });
        info.mid = "7".to_owned();
        info.stream = "camera".to_owned();
        info.version = Some(proto::TimedVersion { unix_micro: Utc::now().timestamp_micros(), ticks: 0 });
        info.set_backup_codec_policy(BackupCodecPolicy::Simulcast);
        let mut codec =
            proto::SimulcastCodecInfo { mime_type: info.mime_type.clone(), mid: info.mid.clone(), ..proto::SimulcastCodecInfo::default() };
        codec.cid = uuid::Uuid::new_v4().to_string();
        codec.set_video_layer_mode(proto::video_layer::Mode::OneSpatialLayerPerStream);
        info.codecs = vec![codec];
        self.sounds.insert(info.sid.clone(), Sound { audio: track.audio, muted: info.muted, mime: info.mime_type.clone() });
        let sid = info.sid.clone();
        self.about_track("track_published", room, identity, &info);
        let participant = self.room_mut(room).participants.iter_mut().find(|participant| participant.identity == identity).expect("just joined");
        participant.is_publisher = true;
        participant.version += 1;
        participant.tracks.push(info);
        sid
    }

    pub fn unpublish(&mut self, track: &str) {
        let (room, identity) = self.publisher(track);
        let participant = self.room_mut(&room).participants.iter_mut().find(|participant| participant.identity == identity).expect("just found");
        let at = participant.tracks.iter().position(|known| known.sid == track).expect("just found");
        let info = participant.tracks.remove(at);
        participant.version += 1;
        self.sounds.remove(track);
        self.about_track("track_unpublished", &room, &identity, &info);
    }

    /// The participant goes, and first all its tracks do.
    pub fn leave(&mut self, room: &str, identity: &str, reason: DisconnectReason) {
        let Some(participant) = self.participant(room, identity) else { return };
        for track in participant.tracks.iter().map(|track| track.sid.clone()).collect::<Vec<_>>() {
            self.unpublish(&track);
        }
        let participants = &mut self.room_mut(room).participants;
        let at = participants.iter().position(|participant| participant.identity == identity).expect("just found");
        let mut info = participants.remove(at);
        (info.state, info.disconnect_reason) = (Connection::Disconnected.into(), reason.into());
        info.version += 1;
        self.about_participant("participant_left", room, &info);
    }

    /// A full reconnect: everything is as before, under new SIDs, which are returned for the tracks.
    pub fn rejoin(&mut self, room: &str, identity: &str) -> Vec<String> {
        let info = self.participant(room, identity).unwrap_or_else(|| panic!("there is no {identity:?} in {room:?}")).clone();
        let tracks: Vec<Track> =
            info.tracks.iter().map(|track| Track { info: track.clone(), audio: self.sounds[&track.sid].audio.clone() }).collect();
        self.leave(room, identity, DisconnectReason::StateMismatch);
        self.join(room, Participant { info: proto::ParticipantInfo { tracks: Vec::new(), is_publisher: false, disconnect_reason: 0, ..info } });
        tracks.into_iter().map(|track| self.publish(room, identity, track)).collect()
    }

    pub fn finish_room(&mut self, name: &str) {
        let identities: Vec<String> = self.room_mut(name).participants.iter().map(|participant| participant.identity.clone()).collect();
        for identity in identities {
            self.leave(name, &identity, DisconnectReason::RoomDeleted);
        }
        let at = self.rooms.iter().position(|room| room.info.name == name).expect("just found");
        let room = self.rooms.remove(at);
        self.outbox.push(event("room_finished", &room.info));
    }

    /// LiveKit sends no webhook for it.
    pub fn set_muted(&mut self, track: &str, muted: bool) {
        self.sounds.get_mut(track).unwrap_or_else(|| panic!("there is no track {track}")).muted = muted;
        let tracks = self.rooms.iter_mut().flat_map(|room| &mut room.participants).flat_map(|participant| &mut participant.tracks);
        tracks.filter(|known| known.sid == track).for_each(|known| known.muted = muted);
    }

    /// The names of the room and the participant that publish a track.
    pub fn publisher(&self, track: &str) -> (String, String) {
        let everyone = self.rooms.iter().flat_map(|room| room.participants.iter().map(move |participant| (room, participant)));
        let found = everyone.into_iter().find(|(_, participant)| participant.tracks.iter().any(|known| known.sid == track));
        let (room, participant) = found.unwrap_or_else(|| panic!("there is no track {track}"));
        (room.info.name.clone(), participant.identity.clone())
    }

    /// As `ListRooms` has it: with its counts, which leave hidden participants out.
    pub fn listed(room: &Room) -> proto::Room {
        let visible = || room.participants.iter().filter(|participant| !participant.permission.as_ref().is_some_and(|permission| permission.hidden));
        let count = |number: usize| u32::try_from(number).expect("a room has its limits");
        let num_publishers = count(visible().filter(|participant| participant.is_publisher).count());
        proto::Room { num_participants: count(visible().count()), num_publishers, ..room.info.clone() }
    }

    fn about_participant(&mut self, name: &str, room: &str, info: &proto::ParticipantInfo) {
        let participant = Some(info.clone());
        let event = proto::WebhookEvent { participant, ..event(name, &self.room_mut(room).info) };
        self.outbox.push(event);
    }

    /// With SID and identity of the participant alone, and SID and name of the room (docs/FACTS.md, webhooks).
    fn about_track(&mut self, name: &str, room: &str, identity: &str, track: &proto::TrackInfo) {
        let sid = self.participant(room, identity).expect("the publisher is here").sid.clone();
        let participant = proto::ParticipantInfo { sid, identity: identity.to_owned(), ..proto::ParticipantInfo::default() };
        let (participant, track) = (Some(participant), Some(track.clone()));
        let room = brief(&self.room_mut(room).info);
        self.outbox.push(proto::WebhookEvent { participant, track, ..event(name, &room) });
    }
}

/// An event with what every one has.
pub fn event(name: &str, room: &proto::Room) -> proto::WebhookEvent {
    let (event, room, created_at) = (name.to_owned(), Some(room.clone()), Utc::now().timestamp());
    proto::WebhookEvent { event, room, created_at, id: sid("EV_"), ..proto::WebhookEvent::default() }
}

fn brief(room: &proto::Room) -> proto::Room {
    proto::Room { sid: room.sid.clone(), name: room.name.clone(), ..proto::Room::default() }
}

/// A new identifier.
pub fn sid(prefix: &str) -> String {
    format!("{prefix}{}", &uuid::Uuid::new_v4().simple().to_string()[..12])
}
