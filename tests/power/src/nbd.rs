//! The guest's disk as qemu sees it: an NBD server with two exports on a Unix socket, `disk` and `notes`.
//!
//! Spec: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>, the fixed newstyle handshake with
//! NBD_OPT_GO and the simple replies of the transmission. One client, our qemu: whatever it would not send ends the
//! connection with an error. Requests are carried out one after another, so what was answered before a flush came is
//! in the log before it.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::Arc,
    thread,
};

use crate::{
    disk::{Disk, Entry},
    script::SECTOR,
};

/// Bytes of the disk for notes.
pub const NOTES_LEN: u64 = 1 << 20;
const REQUEST_LEN_MAX: u32 = 32 << 20;

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const OPT_ABORT: u32 = 2;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERR_UNSUP: u32 = (1 << 31) + 1;
/// NBD_FLAG_HAS_FLAGS, SEND_FLUSH, SEND_FUA.
const TRANSMISSION_FLAGS: u16 = 1 | 1 << 2 | 1 << 3;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const COMMAND_FLAG_FUA: u16 = 1;
const EIO: u32 = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Export {
    Disk,
    Notes,
}

/// Serve as many exports as a guest has drives of it, each on a thread that ends with the guest.
pub fn serve(socket: &Path, exports: usize, disk: Arc<Disk>) -> io::Result<()> {
    if socket.exists() {
        fs::remove_file(socket)?;
    }
    let listener = UnixListener::bind(socket)?;
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok).take(exports) {
            let disk = disk.clone();
            // A guest that is killed leaves in the middle of whatever it was at.
            thread::spawn(move || drop(converse(stream, &disk)));
        }
    });
    Ok(())
}

/// The export `name` of that, as qemu's `-drive` takes it.
pub fn drive(socket: &Path, name: &str) -> String {
    format!("file=nbd:unix:{}:exportname={name}", socket.display())
}

fn converse(mut stream: UnixStream, disk: &Disk) -> io::Result<()> {
    let export = greet(&mut stream, disk)?;
    transmit(&mut stream, disk, export)
}

fn greet(stream: &mut UnixStream, disk: &Disk) -> io::Result<Export> {
    let mut hello = b"NBDMAGIC".to_vec();
    hello.extend(OPTION_MAGIC.to_be_bytes());
    // NBD_FLAG_FIXED_NEWSTYLE, NBD_FLAG_NO_ZEROES.
    hello.extend(3_u16.to_be_bytes());
    stream.write_all(&hello)?;
    let _client_flags = u32::from_be_bytes(take(stream)?);
    loop {
        let _magic: [u8; 8] = take(stream)?;
        let option = u32::from_be_bytes(take(stream)?);
        let mut data = vec![0; length(u32::from_be_bytes(take(stream)?))?];
        stream.read_exact(&mut data)?;
        match option {
            OPT_GO => {
                let name_len = data.first_chunk().map_or(0, |len| u32::from_be_bytes(*len));
                let name = data.get(4..4 + length(name_len)?).unwrap_or_default();
                let (export, len) = match name {
                    b"disk" => (Export::Disk, disk.len()?),
                    b"notes" => (Export::Notes, NOTES_LEN),
                    _ => return Err(io::Error::other("an export that is not here")),
                };
                let mut info = 0_u16.to_be_bytes().to_vec();
                info.extend(len.to_be_bytes());
                info.extend(TRANSMISSION_FLAGS.to_be_bytes());
                answer_option(stream, option, REP_INFO, &info)?;
                answer_option(stream, option, REP_ACK, &[])?;
                return Ok(export);
            }
            OPT_ABORT => return Err(io::Error::other("the client gave up")),
            _ => answer_option(stream, option, REP_ERR_UNSUP, &[])?,
        }
    }
}

fn answer_option(stream: &mut UnixStream, option: u32, reply: u32, data: &[u8]) -> io::Result<()> {
    let mut answer = REPLY_MAGIC.to_be_bytes().to_vec();
    answer.extend(option.to_be_bytes());
    answer.extend(reply.to_be_bytes());
    answer.extend(u32::try_from(data.len()).map_err(io::Error::other)?.to_be_bytes());
    answer.extend(data);
    stream.write_all(&answer)
}

fn transmit(stream: &mut UnixStream, disk: &Disk, export: Export) -> io::Result<()> {
    loop {
        let magic = u32::from_be_bytes(take(stream)?);
        if magic != REQUEST_MAGIC {
            return Err(io::Error::other("not a request"));
        }
        let flags = u16::from_be_bytes(take(stream)?);
        let command = u16::from_be_bytes(take(stream)?);
        let cookie: [u8; 8] = take(stream)?;
        let at = u64::from_be_bytes(take(stream)?);
        let len = length(u32::from_be_bytes(take(stream)?))?;
        let done = match command {
            0 => match export {
                Export::Disk => disk.read(at, len),
                Export::Notes => Ok(vec![0; len]),
            },
            1 => {
                let mut bytes = vec![0; len];
                stream.read_exact(&mut bytes)?;
                let added = match export {
                    Export::Disk => {
                        disk.add(Entry::Write { at, bytes, durable: flags & COMMAND_FLAG_FUA != 0 })
                    }
                    Export::Notes => bytes.chunks(SECTOR).try_for_each(|sector| disk.add(note(sector))),
                };
                added.map(|()| Vec::new())
            }
            2 => return Ok(()),
            3 if export == Export::Disk => disk.add(Entry::Flush).map(|()| Vec::new()),
            3 => Ok(Vec::new()),
            _ => Err(io::Error::other("a command that was not offered")),
        };
        let (error, data) = match done {
            Ok(data) => (0, data),
            Err(_) => (EIO, Vec::new()),
        };
        let mut reply = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        reply.extend(error.to_be_bytes());
        reply.extend(cookie);
        reply.extend(data);
        stream.write_all(&reply)?;
    }
}

/// A note is text up to the first zero.
fn note(sector: &[u8]) -> Entry {
    let text = sector.split(|byte| *byte == 0).next().unwrap_or_default();
    Entry::Note(String::from_utf8_lossy(text).into_owned())
}

fn length(len: u32) -> io::Result<usize> {
    if len > REQUEST_LEN_MAX {
        return Err(io::Error::other("a request that is too long"));
    }
    usize::try_from(len).map_err(io::Error::other)
}

fn take<const N: usize>(stream: &mut UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}
