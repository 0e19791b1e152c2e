//! The way out of damage: what can still be said of a volume's layers is made their map again.
//!
//! A layer whose medium failed is read anew: its map says what was committed. Blocks that a damaged map does not tell
//! are taken from where the file system keeps bytes (layers are identity-mapped): allocated is *data*, the rest is
//! *absent*. That is the best guess there is, so every such range is reported, and nothing is recovered unasked.

use uuid::Uuid;

use super::{device::VolumeInfo, disk::Disk, layer, record::VolumeRecord, tree::Broken};
use crate::{
    cow::{
        BlockState,
        head::HeadIndex,
        map::{
            checkpoint::{self, HEADER_LEN, Header, LogLen},
            log::LogEnd,
        },
    },
    error::{Error, Result},
    exec::{
        head::{data_path, failed_path, publish_map, write_map},
        storage::{Open, Storage},
    },
    units::{BlockCount, BlockRange, ByteLen, ByteRange},
};

/// What a recovery found and did.
#[derive(Clone, Debug)]
pub struct Recovered {
    pub volume: VolumeInfo,
    pub layers: Vec<RecoveredLayer>,
}

/// A layer that was not whole.
#[derive(Clone, Debug)]
pub struct RecoveredLayer {
    pub layer: Uuid,
    /// What was wrong with it.
    pub reason: String,
    /// Ranges whose content is a guess now, or may be older than what was acknowledged before the fault.
    pub guessed: Vec<ByteRange>,
}

impl Disk {
    /// Make a volume writable again after a fault, and say what may have been lost. Refused while anything holds it.
    pub fn recover(&self, volume: &str) -> Result<Recovered> {
        let _life = self.life();
        let open = self.tree().volumes.get(volume).cloned();
        let claim = open.as_ref().map(|volume| volume.claim("it is being recovered")).transpose()?;
        if let Some(volume) = open.as_ref().filter(|volume| !volume.is_quiet()) {
            let by = "it is still writing what was asked of it before it failed".into();
            return Err(Error::InUse { kind: "volume", name: volume.name(), by });
        }
        let record = match &open {
            Some(volume) => volume.record(),
            None => self.broken_record(volume)?,
        };
        // A head that takes writes is whole, and its files are being written to. Why another does not, the disk may not
        // say: the failure could not be marked, or a switch may not have happened.
        let whole = open.as_ref().is_some_and(|volume| volume.live().is_ok()).then_some(record.head);
        let reason = open.as_ref().and_then(|volume| volume.live().err()).map(|error| error.to_string());
        let uncertain = open.as_ref().and_then(|volume| volume.executor()?.uncertain().cloned());
        let mut layers = Vec::new();
        for layer in record.layers.iter().filter(|layer| whole != Some(layer.uuid)) {
            let is_head = layer.uuid == record.head;
            let log_len = if is_head { self.log_len } else { LogLen::Sealed };
            let reason = reason.as_deref().filter(|_| is_head);
            let size = ByteLen(record.size_bytes);
            let recover = || recover_layer(&*self.storage, layer.uuid, size, log_len, reason);
            layers.extend(self.with_reserve(recover)?);
            self.tree().forget_indexes(layer.uuid);
        }
        if let Some(head) = layers.iter_mut().find(|layer| layer.layer == record.head) {
            let volume = ByteRange::new(0, record.size_bytes);
            let uncertain = uncertain.iter().flat_map(|blocks| blocks.iter());
            head.guessed.extend(uncertain.filter_map(|blocks| blocks.bytes().intersect(volume)));
        }
        drop(claim);
        let info = match open.filter(|_| whole.is_some()) {
            Some(volume) => volume.info(),
            None => self.serve_anew(record)?,
        };
        for layer in &layers {
            self.rebuild_over(layer.layer)?;
        }
        Ok(Recovered { volume: info, layers })
    }
}

impl Disk {
    /// Open a volume again whose layers are whole now.
    fn serve_anew(&self, record: VolumeRecord) -> Result<VolumeInfo> {
        // A switch whose sync failed may have left another record than the one that is served from here on.
        self.write_record(&record)?;
        self.tree().volumes.remove(&record.name);
        let opened = self.open_volume(record.clone());
        let mut tree = self.tree();
        tree.broken.retain(|broken| broken.name != record.name);
        match opened {
            Ok(volume) => {
                tree.volumes.insert(record.name, volume.clone());
                drop(tree);
                Ok(volume.info())
            }
            Err(error) => {
                let (name, reason) = (record.name.clone(), error.to_string());
                tree.broken.push(Broken { name, reason, record: Some(record) });
                Err(error)
            }
        }
    }
}

/// Make a layer whole again, and what it shows durable; `None` if it is whole. `reason` is why it is not, where that is
/// known from elsewhere.
fn recover_layer(
    storage: &dyn Storage,
    uuid: Uuid,
    size: ByteLen,
    log_len: LogLen,
    reason: Option<&str>,
) -> Result<Option<RecoveredLayer>> {
    let dir = layer::dir(uuid);
    let (index, end, lost, reason, data) = match layer::open(storage, uuid) {
        Ok(layer) => {
            if reason.is_some() {
                // Without a mark on the disk nothing else makes the data be read anew.
                layer.data.drop_cache()?;
            }
            let Some(reason) = layer.fault.or(reason.map(str::to_owned)) else { return Ok(None) };
            (layer.index, Some(layer.log), layer.lost, reason, layer.data)
        }
        Err(error @ (Error::Corrupt { .. } | Error::Unsupported { .. })) => {
            // Nothing of the map is left: everything is a guess. It may be marked as well, which was not looked at.
            let data = storage.open(&data_path(&dir), Open::Direct)?;
            data.drop_cache()?;
            let blocks = BlockCount(size.blocks_ceil().0.max(ByteLen(data.len()?).blocks_ceil().0));
            let lost = vec![BlockRange { start: crate::units::Block(0), count: blocks }];
            (HeadIndex::new(blocks), None, lost, error.to_string(), data)
        }
        Err(error) => return Err(error),
    };
    let end = end.unwrap_or_else(|| {
        let (bytes, _) = checkpoint::encode(uuid, 1, 0, &index, log_len);
        let first: &[u8; HEADER_LEN] = bytes.first_chunk().expect("a checkpoint starts with a header");
        let header = Header::parse(first, u64::MAX).expect("what was encoded parses");
        LogEnd::start(&header)
    });
    for range in &lost {
        for data in data.data_ranges(range.bytes())? {
            let blocks = data.blocks_touched();
            let count = BlockCount(blocks.end().0.min(index.block_count().0) - blocks.start.0);
            index.set(BlockRange { count, ..blocks }, BlockState::Data);
        }
    }
    data.sync()?;
    let (bytes, header) = checkpoint::encode(uuid, end.generation + 1, end.sequence, &index, log_len);
    write_map(storage, &dir, &bytes, header.log_len)?;
    publish_map(storage, &dir)?;
    match storage.remove_file(&failed_path(&dir)) {
        Err(error) if !error.is_not_found() => return Err(error),
        Ok(()) | Err(_) => storage.sync_dir(&dir)?,
    }
    Ok(Some(RecoveredLayer {
        layer: uuid,
        reason,
        guessed: lost.iter().map(|range| range.bytes()).collect(),
    }))
}
