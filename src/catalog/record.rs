//! The record of an image, `image.json`: its typed form and its strict reading.
//!
//! The file is flat JSON for people's eyes (`RecordFile`); the rest of the program sees [`ImageRecord`], where a
//! state carries exactly what it needs. An unknown version is refused by its number before anything else is looked at,
//! unknown fields and impossible combinations are refused as corrupt. What the record must not hold: credentials.

use std::path::Path;

use bedplate_engine::{
    error::{Corruption, Error, Result},
    image::{Format, device::sectors, qcow2::View},
    units::{ByteLen, ByteOffset, SECTOR_SIZE, VOLUME_SIZE_MAX},
};
use bedplate_inspect::source::NO_BACKING;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    name::ImageName,
    sources::{self, SourceFile},
};

/// The version that this program reads and writes.
pub const RECORD_FORMAT_VERSION: u32 = 1;
/// Largest image file.
pub const IMAGE_SIZE_MAX: u64 = VOLUME_SIZE_MAX;

/// What identifies the verified bytes from outside: when one of these differs, the file is verified again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    pub size_bytes: u64,
    pub mtime_ns: i64,
    pub inode: u64,
}

/// What is true of a copy whose bytes have been verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    pub format: Format,
    /// Bytes of the device over it: whole sectors.
    pub virtual_size_bytes: u64,
    pub sha512: String,
    pub stamp: Stamp,
    /// The files that it was joined from, the top of the chain first; none when its source was one file.
    pub sources: Vec<SourceFile>,
}

/// Kinds of failure that a caller may want to tell apart after a restart, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    Checksum,
    Corrupt,
    NoSpace,
    Unsupported,
    Source,
    TimedOut,
    Cancelled,
    Storage,
}

/// Why an image failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailureRecord {
    pub code: FailureCode,
    pub message: String,
}

/// How far an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordState {
    /// Waits for its turn.
    Pending,
    /// Bytes arrive.
    InProgress,
    /// Verified, durable, served.
    Ready(Published),
    /// Ended with a reason; `published` when there once was a verified file, which is still there.
    Failed { failure: FailureRecord, published: Option<Published> },
}

/// Where the other files of a source lie whose content is joined into one image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// What a directory of layers stands on, or [`NO_BACKING`].
    pub backing: Option<String>,
    /// The directory that the files which a qcow2 file names must lie in.
    pub allow_references: Option<String>,
}

impl Parts {
    /// What is no absolute path, and so would mean something else to whoever has another working directory.
    pub fn relative(&self) -> Option<&str> {
        let backing = self.backing.as_deref().filter(|path| *path != NO_BACKING);
        [backing, self.allow_references.as_deref()].into_iter().flatten().find(|path| !path.starts_with('/'))
    }
}

/// The record of one image on one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageRecord {
    pub name: ImageName,
    pub uuid: Uuid,
    pub created_at: Timestamp,
    /// Where the bytes come from, without credentials.
    pub source: String,
    /// The checksum that was asked for, in its canonical form.
    pub expected: Option<String>,
    /// The longest that the job may take, in seconds, if one was given.
    pub deadline_s: Option<u64>,
    /// The internal snapshot of a qcow2 file that is its content, by id or name.
    pub internal_snapshot: Option<String>,
    /// Of an image that is made of several files.
    pub parts: Parts,
    pub state: RecordState,
}

/// The bytes of `image.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordFile {
    format_version: u32,
    name: String,
    uuid: Uuid,
    state: StateWord,
    created_at: Timestamp,
    source: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    expected_checksum: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deadline_s: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    internal_snapshot: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    allow_references: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sources: Option<Vec<SourceFile>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    format: Option<Format>,
    #[serde(skip_serializing_if = "Option::is_none")]
    size_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    virtual_size_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sha512: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtime_ns: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    inode: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<FailureCode>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StateWord {
    Pending,
    InProgress,
    Ready,
    Failed,
}

/// Enough of any version to say which it is.
#[derive(Deserialize)]
struct VersionOnly {
    format_version: u32,
}

impl ImageRecord {
    pub fn published(&self) -> Option<&Published> {
        match &self.state {
            RecordState::Ready(published) => Some(published),
            RecordState::Failed { published, .. } => published.as_ref(),
            RecordState::Pending | RecordState::InProgress => None,
        }
    }

    /// Which content of its file it is.
    pub fn view(&self) -> View {
        self.internal_snapshot.clone().map_or(View::Active, View::Snapshot)
    }

    /// The name of the image's directory.
    pub fn directory_name(&self) -> String {
        let id = self.uuid.simple().to_string();
        format!("{}-{}", self.name, id.get(..8).unwrap_or(&id))
    }

    pub fn to_json(&self) -> Vec<u8> {
        let published = self.published();
        let (state, failure) = match &self.state {
            RecordState::Pending => (StateWord::Pending, None),
            RecordState::InProgress => (StateWord::InProgress, None),
            RecordState::Ready(_) => (StateWord::Ready, None),
            RecordState::Failed { failure, .. } => (StateWord::Failed, Some(failure)),
        };
        let file = RecordFile {
            format_version: RECORD_FORMAT_VERSION,
            name: self.name.to_string(),
            uuid: self.uuid,
            state,
            created_at: self.created_at,
            source: self.source.clone(),
            expected_checksum: self.expected.clone(),
            deadline_s: self.deadline_s,
            internal_snapshot: self.internal_snapshot.clone(),
            backing: self.parts.backing.clone(),
            allow_references: self.parts.allow_references.clone(),
            sources: published.map(|p| p.sources.clone()).filter(|sources| !sources.is_empty()),
            format: published.map(|p| p.format),
            size_bytes: published.map(|p| p.stamp.size_bytes),
            virtual_size_bytes: published.map(|p| p.virtual_size_bytes),
            sha512: published.map(|p| p.sha512.clone()),
            mtime_ns: published.map(|p| p.stamp.mtime_ns),
            inode: published.map(|p| p.stamp.inode),
            failure: failure.map(|f| f.code),
            message: failure.map(|f| f.message.clone()),
        };
        let mut json = serde_json::to_vec_pretty(&file)
            .expect("strings, numbers and options of them always have a JSON form");
        json.push(b'\n');
        json
    }

    /// Read a record; `path` is named in errors.
    pub fn parse(json: &[u8], path: &Path) -> Result<ImageRecord> {
        let damaged = |what: String| Error::Corrupt {
            path: path.to_owned(),
            what: Corruption::Record(what),
            at: ByteOffset(0),
        };
        let version: VersionOnly = serde_json::from_slice(json).map_err(|e| damaged(e.to_string()))?;
        if version.format_version != RECORD_FORMAT_VERSION {
            let what = format!("an image record of format version {}", version.format_version);
            return Err(Error::Unsupported { path: path.to_owned(), what });
        }
        let file: RecordFile = serde_json::from_slice(json).map_err(|e| damaged(e.to_string()))?;
        file.verify().map_err(damaged)
    }
}

impl RecordFile {
    fn verify(self) -> std::result::Result<ImageRecord, String> {
        let name = ImageName::parse(&self.name).map_err(|e| e.to_string())?;
        let published = match (self.format, self.size_bytes, self.virtual_size_bytes, self.sha512) {
            (Some(format), Some(size_bytes), Some(virtual_size), Some(sha512)) => {
                if size_bytes == 0 || size_bytes > IMAGE_SIZE_MAX {
                    return Err(format!("impossible size_bytes {size_bytes}"));
                }
                let fits = match format {
                    Format::Raw => virtual_size == sectors(ByteLen(size_bytes)).0,
                    Format::Qcow2 => {
                        virtual_size.is_multiple_of(SECTOR_SIZE) && virtual_size <= VOLUME_SIZE_MAX
                    }
                };
                if !fits || virtual_size == 0 {
                    return Err(format!(
                        "virtual_size_bytes {virtual_size} does not fit size_bytes {size_bytes}"
                    ));
                }
                if !sources::is_sha512(&sha512) {
                    return Err("sha512 is not 128 lower-case hexadecimal digits".to_owned());
                }
                let (Some(mtime_ns), Some(inode)) = (self.mtime_ns, self.inode) else {
                    return Err("mtime_ns and inode are missing".to_owned());
                };
                if format == Format::Raw && self.internal_snapshot.is_some() {
                    return Err("a raw file has no internal snapshots".to_owned());
                }
                let sources = match self.sources {
                    None => Vec::new(),
                    Some(_) if format != Format::Raw || !self.source.starts_with('/') => {
                        return Err("only a raw image of files of this machine has sources".to_owned());
                    }
                    Some(sources) if sources.is_empty() => {
                        return Err("an image that is joined from no file".to_owned());
                    }
                    Some(sources) => {
                        sources::verify(&sources)?;
                        sources
                    }
                };
                let stamp = Stamp { size_bytes, mtime_ns, inode };
                Some(Published { format, virtual_size_bytes: virtual_size, sha512, stamp, sources })
            }
            (None, None, None, None) if self.sources.is_some() => {
                return Err("there are sources, but nothing was made of them".to_owned());
            }
            (None, None, None, None) => None,
            _ => return Err("format, size_bytes, virtual_size_bytes and sha512 belong together".to_owned()),
        };
        let state = match (self.state, published, self.failure) {
            (StateWord::Pending, None, None) => RecordState::Pending,
            (StateWord::InProgress, None, None) => RecordState::InProgress,
            (StateWord::Ready, Some(published), None) => RecordState::Ready(published),
            (StateWord::Failed, published, Some(code)) => RecordState::Failed {
                failure: FailureRecord { code, message: self.message.unwrap_or_default() },
                published,
            },
            (StateWord::Pending | StateWord::InProgress | StateWord::Ready | StateWord::Failed, ..) => {
                return Err("the state does not fit the other fields".to_owned());
            }
        };
        Ok(ImageRecord {
            name,
            uuid: self.uuid,
            created_at: self.created_at,
            source: self.source,
            expected: self.expected_checksum,
            deadline_s: self.deadline_s,
            internal_snapshot: self.internal_snapshot,
            parts: Parts { backing: self.backing, allow_references: self.allow_references },
            state,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready() -> ImageRecord {
        ImageRecord {
            name: ImageName::parse("debian").unwrap(),
            uuid: Uuid::new_v4(),
            created_at: Timestamp::now(),
            source: "https://example.org/debian.raw".to_owned(),
            expected: None,
            deadline_s: Some(60),
            internal_snapshot: Some("1".to_owned()),
            parts: Parts { backing: Some("/b".to_owned()), allow_references: Some("/d".to_owned()) },
            state: RecordState::Ready(Published {
                format: Format::Qcow2,
                virtual_size_bytes: 1 << 20,
                sha512: "ab".repeat(64),
                stamp: Stamp { size_bytes: 1000, mtime_ns: 1, inode: 2 },
                sources: Vec::new(),
            }),
        }
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        let mut record = ready();
        for state in [
            record.state.clone(),
            RecordState::Pending,
            RecordState::InProgress,
            RecordState::Failed {
                failure: FailureRecord { code: FailureCode::Checksum, message: "no".to_owned() },
                published: None,
            },
        ] {
            record.state = state;
            assert_eq!(ImageRecord::parse(&record.to_json(), Path::new("r")).unwrap(), record);
        }
    }

    #[test]
    fn version_1_is_read_and_written_as_it_always_was() {
        let golden = format!(
            r#"{{
  "format_version": 1,
  "name": "debian-12",
  "uuid": "0190c3a5-7b1e-4c55-9d0e-2f6a4b8c1d3e",
  "state": "ready",
  "created_at": "2026-11-21T03:00:00Z",
  "source": "https://example.org/debian-12.raw",
  "expected_checksum": "sha512:{sum}",
  "format": "raw",
  "size_bytes": 1000,
  "virtual_size_bytes": 1024,
  "sha512": "{sum}",
  "mtime_ns": 1794884400000000001,
  "inode": 131077
}}
"#,
            sum = "0a".repeat(64)
        );
        let record = ImageRecord::parse(golden.as_bytes(), Path::new("r")).unwrap();
        assert_eq!(record.directory_name(), "debian-12-0190c3a5");
        assert_eq!(String::from_utf8(record.to_json()).unwrap(), golden);
    }

    #[test]
    fn the_files_of_a_joined_image_are_read_as_they_are_written_and_only_where_there_can_be_any() {
        let source =
            |path: &str| SourceFile { path: path.to_owned(), size_bytes: 0, sha512: "cd".repeat(64) };
        let mut record = ready();
        record.internal_snapshot = None;
        record.source = "/replica@monday".to_owned();
        record.state = RecordState::Ready(Published {
            format: Format::Raw,
            virtual_size_bytes: 1024,
            sha512: "ab".repeat(64),
            stamp: Stamp { size_bytes: 1000, mtime_ns: 1, inode: 2 },
            sources: vec![source("/replica/head.img"), source("/backing")],
        });
        let json = String::from_utf8(record.to_json()).unwrap();
        assert!(json.contains(
            r#""path": "/replica/head.img",
      "size_bytes": 0,
      "sha512": "cdcd"#
        ));
        assert_eq!(ImageRecord::parse(json.as_bytes(), Path::new("r")).unwrap(), record);
        let list = json.split_once("\"sources\": ").unwrap().1.split_once("\n  ]").unwrap().0;
        let list = format!("{list}\n  ]");
        for (from, to, why) in [
            ("\"/backing\"", "\"backing\"", "absolute"),
            ("\"sha512\": \"cd", "\"sha512\": \"CD", "sha512"),
            ("\"size_bytes\": 0", "\"len\": 0", "len"),
            ("\"size_bytes\": 0", "\"size_bytes\": -1", "-1"),
            (&list, "[]", "no file"),
            (&list, "{}", "sequence"),
            ("\"/replica@monday\"", "\"https://h/replica\"", "raw image of files"),
            ("\"raw\"", "\"qcow2\"", "raw image of files"),
        ] {
            let bad = json.replacen(from, to, 1);
            assert_ne!(bad, json, "{from}");
            let error = ImageRecord::parse(bad.as_bytes(), Path::new("r")).unwrap_err();
            assert!(matches!(error, Error::Corrupt { .. }), "{from}: {error}");
            assert!(error.to_string().contains(why), "{from}: {error}");
        }
        record.state = RecordState::Pending;
        let pending = String::from_utf8(record.to_json()).unwrap();
        let bad = pending.replacen("\"source\"", &format!("\"sources\": {list}, \"source\""), 1);
        let error = ImageRecord::parse(bad.as_bytes(), Path::new("r")).unwrap_err();
        assert!(error.to_string().contains("nothing was made"), "{error}");
    }

    #[test]
    fn an_unknown_version_is_refused_by_its_number_whatever_else_it_says() {
        let json = br#"{"format_version": 7, "layers": []}"#;
        let error = ImageRecord::parse(json, Path::new("r")).unwrap_err();
        assert!(matches!(&error, Error::Unsupported { what, .. } if what.contains('7')), "{error}");
    }

    #[test]
    fn damage_and_impossible_combinations_are_refused_as_corrupt() {
        let json = String::from_utf8(ready().to_json()).unwrap();
        for (from, to) in [
            ("\"ready\"", "\"pending\""),
            ("\"ready\"", "\"failed\""),
            ("\"size_bytes\": 1000", "\"size_bytes\": 0"),
            ("\"virtual_size_bytes\": 1048576", "\"virtual_size_bytes\": 1048577"),
            ("\"qcow2\"", "\"raw\""),
            ("\"inode\": 2", "\"node\": 2"),
            ("\"sha512\": \"abab", "\"sha512\": \"ABAB"),
            ("\"debian\"", "\"../debian\""),
        ] {
            let bad = json.replacen(from, to, 1);
            assert_ne!(bad, json, "{from}");
            let error = ImageRecord::parse(bad.as_bytes(), Path::new("r")).unwrap_err();
            assert!(matches!(error, Error::Corrupt { .. }), "{from}: {error}");
        }
        let raw = json.replacen("qcow2", "raw", 1).replacen("1048576", "1024", 1);
        let error = ImageRecord::parse(raw.as_bytes(), Path::new("r")).unwrap_err();
        assert!(error.to_string().contains("internal snapshots"), "{error}");
        let whole = raw.replacen("\"internal_snapshot\": \"1\",", "", 1);
        assert!(ImageRecord::parse(whole.as_bytes(), Path::new("r")).is_ok());
        for cut in 0..json.len() - 2 {
            assert!(ImageRecord::parse(&json.as_bytes()[..cut], Path::new("r")).is_err());
        }
    }
}
