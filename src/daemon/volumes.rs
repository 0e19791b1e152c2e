//! The volumes of all disks, by the names that they are served under.
//!
//! Owns that table. Names are unique on a node; where two disks bring the same one, the second is served as
//! `name~uuid8`. The table follows every volume that is made or deleted here, so that a lookup through the mount asks
//! no disk. What a volume is, the engine knows; this only finds it.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bedplate_engine::{
    error::{Error, Result},
    volume::{
        device::{Volume, VolumeInfo},
        disk::Disk,
    },
};
use uuid::Uuid;

/// A volume, found.
#[derive(Clone, Debug)]
pub struct Located {
    /// The name that it is served under.
    pub served: String,
    pub disk: Arc<Disk>,
    /// Its name on that disk.
    pub name: String,
    /// Nil where its record cannot be read.
    pub uuid: Uuid,
}

impl Located {
    /// The volume, if it could be opened. The error of one that could not be is its reason, without its name.
    pub fn open(&self) -> Result<Arc<Volume>> {
        self.disk.volume(&self.name)
    }
}

#[derive(Debug, Default)]
struct Table {
    by_name: BTreeMap<String, Located>,
    by_uuid: HashMap<Uuid, String>,
    /// Names of volumes that are on their way.
    reserved: HashSet<String>,
}

/// The volumes of a node.
#[derive(Debug, Default)]
pub struct Volumes {
    disks: Vec<Arc<Disk>>,
    /// Directories of disks whose volumes nobody can see.
    unserved: Vec<PathBuf>,
    table: Mutex<Table>,
}

/// A name that nobody else can take until this is dropped.
#[derive(Debug)]
pub struct Reservation<'a> {
    volumes: &'a Volumes,
    name: String,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.volumes.lock().reserved.remove(&self.name);
    }
}

impl Volumes {
    /// Those of these disks, which are all open; there may be more on the others.
    pub fn new(disks: Vec<Arc<Disk>>, unserved: Vec<PathBuf>) -> Volumes {
        let volumes = Volumes { disks, unserved, table: Mutex::default() };
        for disk in &volumes.disks {
            for info in disk.volumes() {
                let located = volumes.add(disk, &info);
                if located.served != info.name {
                    tracing::warn!(
                        disk = %disk.path().display(), volume = %info.name, served = %located.served,
                        "a volume of another disk has its name"
                    );
                }
            }
        }
        volumes
    }

    pub fn disks(&self) -> &[Arc<Disk>] {
        &self.disks
    }

    /// By the name that it is served under, or by its uuid.
    pub fn find(&self, name: &str) -> Result<Located> {
        let table = self.lock();
        let found = table.by_name.get(name);
        let found = found.or_else(|| table.by_name.get(table.by_uuid.get(&Uuid::try_parse(name).ok()?)?));
        found.cloned().ok_or_else(|| Error::NotFound { kind: "volume", name: name.into() })
    }

    pub fn find_uuid(&self, uuid: Uuid) -> Option<Located> {
        let table = self.lock();
        table.by_name.get(table.by_uuid.get(&uuid)?).cloned()
    }

    /// Exactly this name, as a file of the mount.
    pub fn find_name(&self, name: &str) -> Option<Located> {
        self.lock().by_name.get(name).cloned()
    }

    pub fn all(&self) -> Vec<Located> {
        self.lock().by_name.values().cloned().collect()
    }

    /// Everything there is to know of every volume, by served name.
    pub fn infos(&self) -> Vec<(Located, VolumeInfo)> {
        let mut infos: HashMap<(Uuid, String), VolumeInfo> = HashMap::new();
        for disk in &self.disks {
            infos.extend(disk.volumes().into_iter().map(|info| ((disk.id(), info.name.clone()), info)));
        }
        let located = self.all().into_iter();
        located
            .filter_map(|located| {
                let info = infos.remove(&(located.disk.id(), located.name.clone()))?;
                Some((located, info))
            })
            .collect()
    }

    /// The same of one volume, which may be one that could not be opened.
    pub fn info(&self, located: &Located) -> Result<VolumeInfo> {
        match located.open() {
            Ok(volume) => Ok(volume.info()),
            Err(error) => {
                let mut infos = located.disk.volumes().into_iter();
                infos.find(|info| info.name == located.name).ok_or(error)
            }
        }
    }

    /// Who stands on an image, or may, in words.
    pub fn users_of(&self, image: Uuid) -> Vec<String> {
        let all = self.all();
        let mut users = Vec::new();
        for disk in &self.disks {
            for name in disk.users_of(image) {
                // One that has just been made is on its disk before it is in the table.
                let located =
                    all.iter().find(|located| located.disk.id() == disk.id() && located.name == name);
                users.push(format!("volume {}", located.map_or(&name, |located| &located.served)));
            }
        }
        let unserved = self.unserved.iter().map(|path| path.display());
        users.extend(unserved.map(|path| format!("the volumes of disk {path}, which is not served")));
        users
    }

    /// Take a name for a volume that is about to be made, on whatever disk.
    pub fn reserve(&self, name: &str) -> Result<Reservation<'_>> {
        let mut table = self.lock();
        if table.by_name.contains_key(name) || !table.reserved.insert(name.to_owned()) {
            return Err(Error::Exists { kind: "volume", name: name.into() });
        }
        Ok(Reservation { volumes: self, name: name.to_owned() })
    }

    /// A volume has been made, or found on a disk.
    pub fn add(&self, disk: &Arc<Disk>, info: &VolumeInfo) -> Located {
        let mut table = self.lock();
        let served = match table.by_name.contains_key(&info.name) {
            false => info.name.clone(),
            true => format!("{}~{}", info.name, info.uuid.simple().to_string().get(..8).unwrap_or_default()),
        };
        let located =
            Located { served: served.clone(), disk: disk.clone(), name: info.name.clone(), uuid: info.uuid };
        if !info.uuid.is_nil() {
            table.by_uuid.insert(info.uuid, served.clone());
        }
        table.by_name.insert(served, located.clone());
        located
    }

    /// A volume has been deleted.
    pub fn remove(&self, located: &Located) {
        let mut table = self.lock();
        table.by_name.remove(&located.served);
        table.by_uuid.remove(&located.uuid);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
