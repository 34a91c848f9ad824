# What is different where SQLite's tests run on a mount, for `testfixture prelude.tcl FILE`. Everything
# here also holds where they run on a bare file system, so that the two can be compared.

# The lock bytes stay where they are in every application: the mount knows SQLite's locks by them. (The
# suite moves them to 64 KiB, so that small files reach beyond them.)
rename sqlite3_test_control_pending_byte {}
proc sqlite3_test_control_pending_byte {args} { return 0x40000000 }

# The program of this name keeps the wal-index in its own memory, unless it is told not to. A mount must
# see it; but some tests write into that memory.
rename testvfs elsewhere_testvfs
proc testvfs {name args} {
  if {!$::elsewhere::own_shm} { set args [linsert $args 0 -fullshm 1] }
  uplevel 1 [list elsewhere_testvfs $name {*}$args]
}

# As SQLite's own quick run does.
set ::G(isquick) 1

# Scripts, tables of text and the like have no place in a mount: they are put into another directory,
# whoever names them.
namespace eval elsewhere {
  variable own_shm 0
  variable dir $::env(TCL_ELSEWHERE)
  variable mount ""
  if {[info exists ::env(TCL_MOUNT)]} { set mount $::env(TCL_MOUNT) }
  variable names {^(\./)?[^/]*\.(tcl|txt|csv|sql|log|data|bin|zip|out|html|c|so|change)$}

  proc path {name} {
    variable dir
    variable names
    if {[regexp $names $name] || $name in {table FOO log}} {
      return [file join $dir [elsewhere_file tail $name]]
    }
    return $name
  }

  proc word {word} {
    set path [path $word]
    if {$path ne $word && [elsewhere_file exists $path]} { return $path }
    return $word
  }

  proc words {list} {
    set words {}
    foreach word $list { lappend words [word $word] }
    return $words
  }

  # Whether a name is that of a database in the mount.
  proc is_database {name} {
    variable mount
    if {$mount eq "" || [regexp -- {-(journal|wal|shm|pos)$} $name]} { return 0 }
    expr {[elsewhere_file dirname [elsewhere_file normalize $name]] eq $mount}
  }

  # A copy of a database on a mount is made by an import: of what SQLite finds in the file with its
  # journal or its log.
  proc import {from to} {
    variable dir
    set copy [elsewhere_file join $dir imported.db]
    foreach suffix {"" -journal -wal} {
      elsewhere_file delete -force $copy$suffix
      if {[elsewhere_file exists $from$suffix]} { elsewhere_file copy $from$suffix $copy$suffix }
    }
    if {[elsewhere_file exists $copy-wal] || [elsewhere_file exists $copy-journal]} {
      set sql "pragma wal_checkpoint(truncate); begin immediate; rollback"
      catch { elsewhere_exec sqlite3 $copy $sql }
      elsewhere_file delete -force $copy-journal $copy-wal $copy-shm
    }
    elsewhere_exec {*}$::env(TCL_IMPORT) -name [elsewhere_file tail $to] $copy
  }

  proc copy {arguments} {
    foreach {from to} [lrange $arguments end-1 end] break
    if {[elsewhere_file isdirectory $to]} {
      set to [elsewhere_file join $to [elsewhere_file tail $from]]
    }
    if {[is_database $to] && [elsewhere_file exists $from] && [elsewhere_file size $from] > 0} {
      if {[elsewhere_file exists $to] && "-force" ni $arguments} {
        error "error copying \"$from\" to \"$to\": file already exists"
      }
      import $from $to
      return
    }
    # Its journal and its log came along with the database.
    if {[regexp -- {^(.*)-(journal|wal|shm|pos)$} $to -> base] && [is_database $base]} return
    elsewhere_file copy {*}$arguments
  }
}

rename file elsewhere_file
proc file {command args} {
  switch -glob -- $command {
    exists - isfile - isdir* - size - mtime - atime - readable - writable - executable - stat -
    lstat - attributes - owned - type {
      set args [lreplace $args 0 0 [elsewhere::path [lindex $args 0]]]
    }
    delete - rename - copy {
      set paths {}
      foreach name $args {
        # The file that says where a database stands goes with it.
        if {$command eq "delete" && $elsewhere::mount ne "" && [string match *-pos $name]} continue
        lappend paths [elsewhere::path $name]
      }
      set args $paths
      if {$command eq "copy"} { return [elsewhere::copy $args] }
    }
  }
  uplevel 1 [list elsewhere_file $command {*}$args]
}

rename open elsewhere_open
proc open {name args} {
  if {[string match |* $name]} {
    set name [join [elsewhere::words [split $name " "]] " "]
  } else {
    set name [elsewhere::path $name]
  }
  uplevel 1 [list elsewhere_open $name {*}$args]
}

rename exec elsewhere_exec
proc exec {args} { uplevel 1 [list elsewhere_exec {*}[elsewhere::words $args]] }

rename source elsewhere_source
proc source {args} {
  set path [elsewhere::path [lindex $args end]]
  uplevel 1 [list elsewhere_source {*}[lrange $args 0 end-1] $path]
}

rename glob elsewhere_glob
proc glob {args} {
  set found {}
  foreach name [uplevel 1 [list elsewhere_glob {*}$args]] {
    if {![string match *-pos $name]} { lappend found $name }
  }
  return $found
}

# Runs the file, whose name is in `argv0`, command by command: what ends with an error is told, and the rest is run.
proc elsewhere::run {} {
  set channel [elsewhere_open $::argv0]
  set lines [split [read $channel] \n]
  close $channel
  info script $::argv0
  set command ""
  foreach line $lines {
    append command $line \n
    if {![info complete $command]} continue
    set code [catch { uplevel #0 $command } said]
    set command ""
    if {$code == 1} { puts "Command failed: [lindex [split $said \n] 0]" }
    if {$code == 2} break
  }
  # It ends the process; some files leave before they come to theirs, or to any test.
  if {[info commands finish_test] ne ""} { uplevel #0 finish_test }
  puts "0 errors out of 0 tests"
}

set argv0 [lindex $argv 0]
set argv [lrange $argv 1 end]
set channel [elsewhere_open $argv0]
set elsewhere::own_shm [regexp {(tvfs|T|tv) shm |devchar|iversion} [read $channel]]
close $channel
unset channel
elsewhere::run
